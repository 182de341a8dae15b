"""Similarities of neighbourhoods: structural similarity, and histograms of oriented gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import maps as ops
from ..checks import Kind
from ..fields import Count, Positive
from ..registry import METRICS
from .base import MapMetric
from .filters import filtered, gaussian_window


@METRICS.register("ssim", paper="Wang et al. 2004, eq. 13; on maps: Adebayo et al. 2018, section 4")
@dataclass(frozen=True)
class SSIM(MapMetric):
    """Structural similarity of the rescaled maps (Gaussian window 11, sigma 1.5), in ``[-1, 1]``; 1 is equal.

    Wang et al.'s definition: population variances, ``K1 = 0.01``, ``K2 = 0.03``, averaged over the places where the
    window fits, so nothing is padded. scikit-image with ``gaussian_weights=True, use_sample_covariance=False`` gives
    the same; torchmetrics pads, averages over the borders too and differs by up to some percent on small maps. On a map
    smaller than the window, the window is cut to the largest odd side that fits.

    Args:
        rescale: how each map is rescaled first.
        data_range: ``L``, the distance between the smallest and the largest value possible; 1 after ``minmax``.
    """

    rescale: ops.Rescale = "minmax"
    data_range: Positive = 1.0

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)
    differentiable: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        return ssim(ops.rescale(maps, self.rescale), ops.rescale(reference, self.rescale), self.data_range)


def ssim(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Mean structural similarity of two batches of planes ``[B, H, W]``, ``[B]`` (Wang et al. 2004, eq. 13)."""
    radius = min(5, (min(a.shape[-2:]) - 1) // 2)
    # Only the sum of the variances is needed, so one filter of the summed squares.
    stacked = torch.stack([a, b, a * a + b * b, a * b])
    mu_a, mu_b, squares, product = filtered(stacked, gaussian_window(radius, 1.5, a)).unbind()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mu_product, mu_squares = mu_a * mu_b, mu_a * mu_a + mu_b * mu_b
    luminance = (2 * mu_product + c1) / (mu_squares + c1)
    structure = (2 * (product - mu_product) + c2) / (squares - mu_squares + c2)
    return (luminance * structure).flatten(1).mean(1)


@METRICS.register("hog", paper="Adebayo et al. 2018, section 4; HOG: Dalal and Triggs 2005")
@dataclass(frozen=True)
class HOG(MapMetric):
    """Pearson's correlation of the maps' histograms of oriented gradients, in ``[-1, 1]``; 1 is equal.

    Nine unsigned orientations without interpolation, blocks of 3 x 3 cells, L2-Hys, of min-max rescaled maps: the
    descriptor of ``skimage.feature.hog``. On a map smaller than a block, cells (then blocks) shrink until one fits. The
    histogram's bins are taken as constant by the gradient. NaN if either descriptor is constant, as a flat map's is.

    Args:
        cell: side of a cell in pixels; Adebayo et al.'s code takes 16 on 224 x 224.
    """

    cell: Count = 16

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)
    differentiable: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        return ops.correlation(*(hog(ops.minmax(m), self.cell) for m in (maps, reference)))


def hog(maps: Tensor, cell: int = 16, block: int = 3, orientations: int = 9) -> Tensor:
    """HOG descriptors ``[B, D]`` of ``[B, H, W]``; L2-Hys over blocks of ``block x block`` cells."""
    height, width = maps.shape[-2:]
    cell = max(1, min(cell, height // block, width // block))
    down, across = height // cell, width // cell
    block = min(block, down, across)
    rows, columns = _central(maps.mT).mT, _central(maps)
    size = torch.linalg.vector_norm(torch.stack([rows, columns]), dim=0)
    angle = torch.rad2deg(torch.atan2(rows.detach(), columns.detach())) % 180
    bins = (angle / (180 / orientations)).long().clamp(max=orientations - 1)
    at = torch.arange(down, device=maps.device).repeat_interleave(cell)[:, None] * across
    at = (at + torch.arange(across, device=maps.device).repeat_interleave(cell)) * orientations
    places = (at + bins[:, : down * cell, : across * cell]).flatten(1)
    votes = size[:, : down * cell, : across * cell].flatten(1) / cell**2
    cells = maps.new_zeros(len(maps), down * across * orientations).scatter_add(1, places, votes)
    blocks = cells.reshape(-1, down, across, orientations).unfold(1, block, 1).unfold(2, block, 1)
    return _l2_hys(blocks.permute(0, 1, 2, 4, 5, 3).flatten(3)).flatten(1)


def _central(maps: Tensor) -> Tensor:
    # Central differences along the last axis, zero at its ends.
    if maps.shape[-1] < 3:
        return maps * 0
    return F.pad(maps[..., 2:] - maps[..., :-2], (1, 1))


def _l2_hys(blocks: Tensor, eps: float = 1e-5) -> Tensor:
    clipped = (blocks / (blocks.square().sum(-1, keepdim=True) + eps**2).sqrt()).clamp(max=0.2)
    return clipped / (clipped.square().sum(-1, keepdim=True) + eps**2).sqrt()
