"""Correlations of maps: of their values, and of their ranks.

With a constant map every correlation is undefined: it is NaN, with zero gradient (scipy gives NaN too;
torchmetrics gives 0 for Spearman).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import maps as ops
from ..registry import METRICS
from .base import MapMetric
from .ranking import kendall_tau, spearman


@METRICS.register("pearson", paper="Adebayo et al. 2018, section 4")
@dataclass(frozen=True)
class Pearson(MapMetric):
    """Pearson's correlation over pixels, in ``[-1, 1]``; 1 is equal up to scale and offset.

    NaN if either map is constant.
    """

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        return ops.correlation(maps.flatten(1), reference.flatten(1))


@METRICS.register("spearman", paper="Ghorbani et al. 2019, section 3; Adebayo et al. 2018, section 4")
@dataclass(frozen=True)
class Spearman(MapMetric):
    """Spearman's rank correlation over pixels, ties by average rank, in ``[-1, 1]``; 1 is the same order.

    NaN if either map is constant.

    Args:
        magnitude: rank magnitudes; Adebayo et al. report the figure for signed values and for magnitudes.
    """

    magnitude: bool = False

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        return spearman(*((m.abs() if self.magnitude else m).flatten(1) for m in (maps, reference)))


@METRICS.register("kendall", paper="Chen et al. 2019, robust attribution regularization")
@dataclass(frozen=True)
class Kendall(MapMetric):
    """Kendall's rank correlation tau-b over pixels, in ``[-1, 1]``; 1 is the same order.

    Exact and about as fast as sorting: maps of 224 x 224 need no subsampling. NaN if either map is constant.

    Args:
        magnitude: rank magnitudes instead of signed values.
    """

    magnitude: bool = False

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        return kendall_tau(*((m.abs() if self.magnitude else m).flatten(1) for m in (maps, reference)))
