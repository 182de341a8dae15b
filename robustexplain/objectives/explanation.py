"""What an adversary wants of the map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import maps as ops
from ..errors import InputError
from ..registry import OBJECTIVES
from .base import Goal, Objective, Seen


@OBJECTIVES.register("match-map", paper="Zhang et al. 2020, eq. 3", needs=("gradients",))
@dataclass(frozen=True)
class MatchMap(Objective):
    """Mean squared difference between the rescaled map and the rescaled goal map, on the interpreter's own grid.

    Args:
        rescale: applied to both maps; ``minmax`` (Zhang et al. for CAM and GRAD), ``none`` (RTS), ``sum`` (Dombrowski).
        pool: average-pool both maps by this factor first (Zhang et al. compare GRAD maps after 4 x 4).
    """

    rescale: ops.Rescale = "minmax"
    pool: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """Mean over pixels of the squared difference."""
        if goal.goal_map is None or seen.maps is None:
            raise InputError("MatchMap needs a goal map and maps that were seen")
        now, wanted = (ops.rescale(ops.pool(m, self.pool), self.rescale) for m in (seen.maps, goal.goal_map))
        return (now - wanted).square().flatten(1).mean(1)


@OBJECTIVES.register("agree-encoder", paper="Zhang et al. 2020, section 3.4 (l_enc)")
@dataclass(frozen=True)
class AgreeEncoder(Objective):
    """Cross-entropy of a model-guided interpreter's own encoder towards ``goal_class``.

    Without it the encoder's class selector still sees the true class.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """Cross-entropy, nats; zero for an interpreter without an encoder."""
        if seen.encoder_logits is None or goal.goal_class is None:
            return seen.logits.new_zeros(len(seen.logits))
        return -seen.encoder_logits.log_softmax(1).gather(1, goal.goal_class[:, None])[:, 0]
