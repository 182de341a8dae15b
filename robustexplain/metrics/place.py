"""Metrics of the position of a map's weight: its top pixels, its centre, the earth mover's distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import maps as ops
from ..checks import Kind
from ..fields import Count, Positive, check_k
from ..registry import METRICS
from .base import MapMetric
from .ranking import top_k_shared


@METRICS.register("top-k", paper="Ghorbani et al. 2019, section 3")
@dataclass(frozen=True)
class TopK(MapMetric):
    """Share of the ``k`` most important pixels that both maps share, in ``[0, 1]``; 1 is the same pixels.

    Pixels tied at the ``k``-th value share the places left (:func:`robustexplain.maps.top_k`) and the smaller of
    the two shares counts: the value does not depend on the order of pixels, and a constant map ranks all alike.

    Args:
        k: a count from 1 on, a share of the pixels below 1 (Ghorbani et al.: 1000 of 227 x 227; Heo et al.: a tenth).
        magnitude: importance is the magnitude; ``False`` takes signed values.

    Examples:
        >>> import torch
        >>> from robustexplain.metrics import TopK
        >>> before, after = torch.tensor([[[0.9, 0.8, 0.1, 0.0]]]), torch.tensor([[[0.9, 0.1, 0.8, 0.0]]])
        >>> TopK(k=2)(after, before)
        tensor([0.5000])
    """

    k: Positive = 0.1
    magnitude: bool = True

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        k = ops.top_k_count(self.k, maps[0].numel())
        a, b = ((m.abs() if self.magnitude else m).flatten(1) for m in (maps, reference))
        # Shares of tied places can exceed k by rounding.
        return (top_k_shared(a, b, k) / k).clamp(max=1)


@METRICS.register("center-shift", paper="Ghorbani et al. 2019, section 3 (mass-center)")
@dataclass(frozen=True)
class CenterShift(MapMetric):
    """Distance in pixels between the maps' centres of mass, from 0 (the same centre) to the map's diagonal.

    Mass is magnitude. The centre of a flat or an all-zero map is the middle. Departure: Ghorbani et al.'s code
    truncates centres to whole pixels.

    Args:
        rescale: how each map is rescaled first (Heo et al.: ``minmax``); a factor alone changes nothing.
    """

    rescale: ops.Rescale = "none"

    higher_is_closer: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0, math.inf)
    differentiable: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        a, b = (ops.center_of_mass(ops.rescale(m, self.rescale)) for m in (maps, reference))
        shift: Tensor = torch.linalg.vector_norm(a - b, dim=1)
        return shift


@METRICS.register("emd", paper="Rubner et al. 2000; sliced: Bonneel et al. 2015")
@dataclass(frozen=True)
class EarthMover(MapMetric):
    """Sliced earth mover's distance in pixels between the maps' magnitudes, each of unit mass; 0 is equal.

    The exact distance costs ``N^3``. This is its average over one-dimensional projections along ``directions`` evenly
    spaced directions, each of which is exact, so it never exceeds the exact distance; mass moved by ``d`` pixels is at
    about ``2 d / pi``. An all-zero map counts as uniform.

    Args:
        directions: their number; 2 are rows and columns.
    """

    directions: Count = 8

    higher_is_closer: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0, math.inf)
    differentiable: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        surplus = ops.distribution(maps) - ops.distribution(reference)
        total = torch.zeros_like(surplus[:, 0])
        for angle in range(self.directions):
            places, order = self._projected(maps, math.pi * angle / self.directions)
            # The integral of |F_a - F_b|: between neighbouring places the difference is constant.
            carried = surplus[:, order].cumsum(1)[:, :-1].abs()
            total = total + (carried * places.diff()).sum(1)
        return total / self.directions

    @staticmethod
    def _projected(maps: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(n, device=maps.device, dtype=maps.dtype) for n in maps.shape[1:])
        places = (math.sin(angle) * rows[:, None] + math.cos(angle) * columns).flatten()
        ordered = places.sort(stable=True)
        return ordered.values, ordered.indices
