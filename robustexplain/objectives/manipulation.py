"""Objectives on the maps of a model whose weights the adversary trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import maps as ops
from ..errors import InputError
from ..fields import Positive, check_k
from ..metrics.structure import ssim
from ..registry import OBJECTIVES
from .base import Goal, Objective, Observation
from .explanation import both_maps


@OBJECTIVES.register("fade-top-k", paper="Heo et al. 2019, published version and code (top-k fooling)")
@dataclass(frozen=True)
class FadeTopK(Objective):
    """Mean squared rescaled value at the pixels where the honest map was highest.

    In ``[0, 1]``: the map is min-max rescaled, the pixels are the ``k`` highest of the honest map (signed, as in the
    code).

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
        """``1/k sum over the honest top k of h^2``."""
        now, honest = both_maps(self, seen, goal)
        k = ops.top_k_count(self.k, honest[0].numel())
        return (ops.minmax(now).flatten(1).square() * ops.top_k(honest, k).to(now)).sum(1) / k


@OBJECTIVES.register("move-center", paper="Heo et al. 2019, published version and code (center-mass fooling)")
@dataclass(frozen=True)
class MoveCenter(Objective):
    """Minus how far the centre of the rescaled map moved from the honest one's, rows and columns added up.

    ``-(|dh| + |dw|)`` of min-max rescaled maps, in shares of the sides (pixels in the code: with square maps of side
    ``s`` its weight is ours over ``s - 1``). At the honest map itself the slope is one-sided; a first step of the
    weights leaves that point.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -2.0

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """In ``[-2, 0]``."""
        now, honest = both_maps(self, seen, goal)
        shift = ops.center_of_mass(ops.minmax(now)) - ops.center_of_mass(ops.minmax(honest))
        sides = shift.new_tensor([max(1, side - 1) for side in now.shape[1:]])
        return -(shift / sides).abs().sum(1)


@OBJECTIVES.register("spread-uniformly", paper="Heo et al. 2019, arXiv v1 eq. 4 (uniform fooling)")
@dataclass(frozen=True)
class SpreadUniformly(Objective):
    """Minus the entropy of the magnitudes' shares, in nats: least, ``-log N``, for a flat map."""

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -math.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``sum_j p_j log p_j`` with ``p = |h| / sum |h|``."""
        return -ops.entropy(_maps(self, seen))


@OBJECTIVES.register("match-structure", paper="Noppel et al. 2023 and code (DSSIM)")
@dataclass(frozen=True)
class MatchStructure(Objective):
    """Structural dissimilarity of the rescaled map and the rescaled goal map: ``(1 - SSIM) / 2``, in ``[0, 1]``.

    Args:
        rescale: applied to both maps.
    """

    rescale: ops.Rescale = "minmax"

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``(1 - SSIM(m, goal)) / 2``."""
        if goal.goal_map is None:
            raise InputError("MatchStructure needs a goal map")
        now, wanted = (ops.rescale(m, self.rescale) for m in (_maps(self, seen), goal.goal_map))
        return (1 - ssim(now, wanted, 1.0)) / 2


@OBJECTIVES.register("hide-feature", paper="Dimanov et al. 2020 and code")
@dataclass(frozen=True)
class HideFeature(Objective):
    """Mean magnitude of the map where the goal map is not zero: a table's column, an image's region.

    Dimanov et al. take the sum over the batch of the 1-norm of the loss's gradient by the feature; with the map that is
    the loss's gradient, and a mean in place of the sum, their weight is ours over the batch size.

    Args:
        relative: use the share of the whole map's magnitude, which a smaller scale of the map does not change.
    """

    relative: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``mean over the region of |m|``, or ``sum over the region of |m| / sum |m|``."""
        if goal.goal_map is None:
            raise InputError("HideFeature needs a goal map: the region, 1 where the map is to be small")
        region = (goal.goal_map != 0).flatten(1).to(seen.logits)
        maps = _maps(self, seen)
        if self.relative:
            return (ops.unit_sum(maps).flatten(1) * region).sum(1)
        return (maps.flatten(1).abs() * region).sum(1) / region.sum(1)


def _maps(objective: Objective, seen: Observation) -> Tensor:
    if seen.maps is None:
        raise InputError(f"{type(objective).__name__} needs an observation with maps")
    return seen.maps
