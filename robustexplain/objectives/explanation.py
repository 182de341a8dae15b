"""Objectives on the map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import maps as ops
from ..errors import InputError
from ..fields import NonNegative, Positive, check_k
from ..registry import OBJECTIVES
from .base import Goal, Objective, Observation
from .confident import nats


@OBJECTIVES.register("match-map", paper="Zhang et al. 2020, eq. 3", needs=("gradients",))
@dataclass(frozen=True)
class MatchMap(Objective):
    """Mean squared difference between the rescaled map and the rescaled goal map, on the interpreter's own grid.

    Args:
        rescale: applied to both maps; ``minmax`` (Zhang et al. for CAM and GRAD), ``none`` (RTS), ``sum`` (Dombrowski).
        pool: average-pool both maps by this factor first (Zhang et al. compare GRAD maps after 4 x 4).
        relative: multiply the rescaled maps by their pixel count ``N``. Maps under ``sum`` then have a mean of
            one, and the loss does not depend on the size of the grid; without it, it falls with ``1 / N^2``.
    """

    rescale: ops.Rescale = "minmax"
    pool: int = 1
    relative: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    @property
    def settled(self) -> bool:
        """Always."""
        return True

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """Mean over pixels of the squared difference."""
        if goal.goal_map is None or seen.maps is None:
            raise InputError("MatchMap needs a goal map and an observation with maps")
        now, wanted = (ops.rescale(ops.pool(m, self.pool), self.rescale) for m in (seen.maps, goal.goal_map))
        factor = now[0].numel() if self.relative else 1
        return (factor * (now - wanted)).square().flatten(1).mean(1)


@OBJECTIVES.register("leave-map", paper="Zhang et al. 2020, eq. 3, with its sign changed", needs=("gradients",))
@dataclass(frozen=True)
class LeaveMap(Objective):
    """Minus the mean squared difference between the rescaled map and the rescaled benign map.

    At the benign map it has no gradient: a search must start elsewhere.

    Args:
        rescale: applied to both maps.
    """

    rescale: ops.Rescale = "minmax"

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -math.inf

    @property
    def settled(self) -> bool:
        """Always."""
        return True

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """Minus the mean over pixels of the squared difference."""
        now, benign = (ops.rescale(m, self.rescale) for m in both_maps(self, seen, goal))
        return -(now - benign).square().flatten(1).mean(1)


@OBJECTIVES.register("agree-encoder", paper="Zhang et al. 2020, section 3.4 (l_enc)")
@dataclass(frozen=True)
class AgreeEncoder(Objective):
    """Cross-entropy of a model-guided interpreter's own encoder towards ``goal_class``.

    Without it the encoder's class selector still gets the true class.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """Cross-entropy, nats; zero for an interpreter without an encoder."""
        if seen.encoder_logits is None or goal.goal_class is None:
            return seen.logits.new_zeros(len(seen.logits))
        return nats(-seen.encoder_logits.log_softmax(1).gather(1, goal.goal_class[:, None])[:, 0])


@OBJECTIVES.register("drop-top-k", paper="Ghorbani et al. 2019, Algorithm 1 (top-k attack)", needs=("gradients",))
@dataclass(frozen=True)
class DropTopK(Objective):
    """Share of the map's magnitude on the ``k`` most important pixels of the benign map.

    In ``[0, 1]``; times ``N`` it is the sum of their maps, which they rescale to a mean of one.

    Args:
        k: a count from 1 on (Ghorbani et al.: 1000 of 227 x 227), a share of the pixels below 1.
    """

    k: Positive = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k)

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``sum over the benign top k of |m| / sum |m|``."""
        now, benign = both_maps(self, seen, goal)
        chosen = ops.top_k(benign.abs(), ops.top_k_count(self.k, benign[0].numel()))
        return (ops.unit_sum(now).flatten(1) * chosen.to(now)).sum(1)


@OBJECTIVES.register("top-k-left", paper="Ghorbani et al. 2019, section 3 (top-k intersection)")
@dataclass(frozen=True)
class TopKLeft(Objective):
    """How many of the ``k`` most important pixels of the benign map still are: a count, without a gradient.

    In a sum with another objective it changes no direction but decides which iterate is best: Ghorbani et al. accept by
    the intersection, and descend on :class:`DropTopK`, which breaks ties as long as it stays below 1.

    Args:
        k: a count from 1 on, a share of the pixels below 1.
    """

    k: Positive = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k)

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``|top_k(m) and top_k(benign)|``; pixels tied at the last rank share the ranks left."""
        now, benign = (m.detach().abs() for m in both_maps(self, seen, goal))
        k = ops.top_k_count(self.k, benign[0].numel())
        return torch.minimum(ops.top_k(now, k), ops.top_k(benign, k).to(now)).sum(1)


@OBJECTIVES.register(
    "shift-center", paper="Ghorbani et al. 2019, Algorithm 1 (mass-center attack)", needs=("gradients",)
)
@dataclass(frozen=True)
class ShiftCenter(Objective):
    """Minus the squared distance, in pixels, of the map's centre of mass to that of the benign map.

    At the benign map that distance is at its minimum and has no gradient: a search that starts there does not move.
    Departure, for that reason: the distance is measured to a point ``nudge`` pixels away from the benign centre, on the
    side of the nearer border, so that the first step leads away from that border.

    Args:
        nudge: in pixels of the map's grid; 0 is the published distance.
    """

    nudge: NonNegative = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -math.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``-||C(m) - (C(benign) - nudge u)||^2``, ``u`` the unit vector from the benign centre to the middle."""
        now, benign = both_maps(self, seen, goal)
        start = ops.center_of_mass(benign)
        middle = start.new_tensor([(side - 1) / 2 for side in benign.shape[1:]])
        inward = middle - start
        length = torch.linalg.vector_norm(inward, dim=1, keepdim=True)
        # A benign centre in the middle is equally far from every border: any direction.
        u = torch.where(length > 0, inward / length.clamp(min=1e-12), start.new_tensor([1.0, 0.0]))
        return -(ops.center_of_mass(now) - (start - self.nudge * u)).square().sum(1)


@OBJECTIVES.register("fill-region", paper="Ghorbani et al. 2019, section 3 (targeted attack)", needs=("gradients",))
@dataclass(frozen=True)
class FillRegion(Objective):
    """Minus the share of the map's magnitude that lies in the region: where the goal map is high.

    In ``[-1, 0]``. A goal map of zeros and ones is the published region; any other one is rescaled to ``[0, 1]`` and
    weighs its pixels.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -1.0

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``-sum of |m| r / sum |m|`` with the region ``r``."""
        if goal.goal_map is None or seen.maps is None:
            raise InputError("FillRegion needs a goal map, the region, and an observation with maps")
        region = ops.minmax(goal.goal_map.to(seen.maps))
        return -(ops.unit_sum(seen.maps) * region).flatten(1).sum(1)


def both_maps(objective: Objective, seen: Observation, goal: Goal) -> tuple[Tensor, Tensor]:
    """The observed and the benign maps.

    Raises:
        InputError: one of them is missing.
    """
    if goal.benign_map is None or seen.maps is None:
        raise InputError(f"{type(objective).__name__} needs the benign map and an observation with maps")
    return seen.maps, goal.benign_map
