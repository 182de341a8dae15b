"""Distances of maps pixel by pixel.

L1, L2 and IoU take each map rescaled to ``[0, 1]`` on its own (min-max), as Zhang et al. 2020 measure them: a constant
map rescales to all zeros, so two constant maps are at distance zero. Figures depend on the grid: maps of CAM methods
are compared at the input's size here, where the paper compares on the ``7 x 7`` grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import maps as ops
from ..fields import Fraction
from ..registry import METRICS
from .base import MapMetric


@METRICS.register("l1", paper="Zhang et al. 2020, section 4 Q2")
@dataclass(frozen=True)
class L1(MapMetric):
    """Mean absolute difference of the rescaled maps, in ``[0, 1]``; 0 is equal."""

    higher_is_closer: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        distance: Tensor = (ops.minmax(maps) - ops.minmax(reference)).abs().flatten(1).mean(1)
        return distance


@METRICS.register("l2", paper="Zhang et al. 2020, appendix C1")
@dataclass(frozen=True)
class L2(MapMetric):
    """Root mean squared difference of the rescaled maps (``||.||_2 / sqrt(N)``), in ``[0, 1]``; 0 is equal."""

    higher_is_closer: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        # vector_norm's gradient at zero is zero, where that of a square root is infinite.
        difference = (ops.minmax(maps) - ops.minmax(reference)).flatten(1)
        distance: Tensor = torch.linalg.vector_norm(difference, dim=1) / difference.shape[1] ** 0.5
        return distance


@METRICS.register("iou", paper="Zhang et al. 2020, section 4 Q2 (IoU test)")
@dataclass(frozen=True)
class IoU(MapMetric):
    """Intersection over union of the rescaled maps, binarised at ``threshold``, in ``[0, 1]``; 1 is equal.

    The paper calls a map plausible above an IoU of 0.5 and does not say at which value it binarises; ours is a setting
    and is stated in every report. Two empty sets (constant maps) count as equal.

    Args:
        threshold: a pixel belongs to the region if its rescaled value reaches this.
    """

    threshold: Fraction = 0.5

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0, 1)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        a, b = (ops.binarise(m, self.threshold).flatten(1) for m in (maps, reference))
        union = (a | b).sum(1)
        # The integers' ratio would be float32, whatever the maps are.
        both = (a & b).sum(1).to(maps.dtype) / union.clamp(min=1)
        return torch.where(union > 0, both, torch.ones_like(both))


@METRICS.register("mse", paper="Dombrowski et al. 2019; Noppel et al. 2023")
@dataclass(frozen=True)
class MSE(MapMetric):
    """Mean squared difference of the maps as they are (or rescaled), 0 is equal.

    Args:
        rescale: ``none`` compares raw values, so that a map and its double differ; Dombrowski et al. compare maps of
            unit sum (``sum``), Noppel et al. maps in ``[0, 1]`` (``minmax``).
    """

    rescale: ops.Rescale = "none"

    higher_is_closer: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0, torch.inf)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        difference = ops.rescale(maps, self.rescale) - ops.rescale(reference, self.rescale)
        distance: Tensor = difference.square().flatten(1).mean(1)
        return distance


@METRICS.register("cosine", paper="Joo et al. 2023, local gradient alignment")
@dataclass(frozen=True)
class Cosine(MapMetric):
    """Cosine of the angle between the raw maps, in ``[-1, 1]``; 1 is equal up to a positive factor.

    An all-zero map has no direction: NaN, with zero gradient.
    """

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        a, b = _scaled(maps.flatten(1)), _scaled(reference.flatten(1))
        norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
        points = norms > 0
        cosine = ((a * b).sum(1) / torch.where(points, norms, 1)).clamp(-1, 1)
        return torch.where(points, cosine, torch.nan)


def _scaled(rows: Tensor) -> Tensor:
    # The largest magnitude cancels: dividing by it keeps the squares of tiny maps from vanishing.
    largest = torch.maximum(rows.detach().amax(1, keepdim=True), -rows.detach().amin(1, keepdim=True))
    return rows / torch.where(largest > 0, largest, 1)
