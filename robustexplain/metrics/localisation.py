"""Whether a map points at the object: measures against a region, and regions from boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import maps as ops
from ..errors import InputError
from ..fields import Fraction, NonNegative
from ..registry import METRICS
from .base import Better, Localisation


def regions_from_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels of boxes as bool ``[B, H, W]``; several boxes of a sample are united.

    Args:
        boxes: ``[B, 4]`` or ``[B, n, 4]``: left, top, right, bottom in pixels, right and bottom exclusive. A pixel
            belongs to a box that covers its centre. Padding boxes of no area cover nothing.
        size: ``(H, W)``.

    Raises:
        InputError: another shape, or NaN.
    """
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4:
        raise InputError(f"boxes must be [B, 4] or [B, n, 4], got {list(boxes.shape)}")
    if boxes.isnan().any():
        raise InputError("boxes hold NaN")
    left, top, right, bottom = boxes.reshape(len(boxes), -1, 4, 1).double().unbind(2)
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (down[..., :, None] & across[..., None, :]).any(1)


@METRICS.register(
    "pointing-game", paper="Zhang et al. 2018, top-down neural attention (pointing game)", needs=("regions",)
)
@dataclass(frozen=True)
class PointingGame(Localisation):
    """Whether the map's peak lies within ``tolerance`` pixels of the region: 1 is a hit, 0 a miss.

    Of peaks tied for the largest value, the share that hits, so a flat map scores the region's share of the image
    (Quantus calls it a hit if any of them does, so a flat map always hits).

    Args:
        tolerance: in pixels, Euclidean (the paper: 15).
    """

    tolerance: NonNegative = 0.0

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    binary: ClassVar[bool] = True

    def _measure(self, maps: Tensor, region: Tensor) -> Tensor:
        flat = maps.flatten(1)
        peaks = flat == flat.amax(1, keepdim=True)
        near = self._grown(region).flatten(1)
        return (peaks & near).sum(1).to(maps.dtype) / peaks.sum(1)

    def _grown(self, region: Tensor) -> Tensor:
        reach = int(self.tolerance)
        if reach == 0:
            return region
        offsets = torch.arange(-reach, reach + 1, device=region.device).float()
        disk = (offsets[:, None] ** 2 + offsets**2 <= self.tolerance**2).float()
        return F.conv2d(region[:, None].float(), disk[None, None], padding=reach)[:, 0] > 0.5


@METRICS.register("mass-inside", paper="Arras et al. 2022, CLEVR-XAI (relevance mass accuracy)", needs=("regions",))
@dataclass(frozen=True)
class MassInside(Localisation):
    """Share of the map's mass that lies inside the region, in ``[0, 1]``; high is well placed.

    A map without mass prefers no pixel and scores the region's share of the image (Quantus: NaN).

    Args:
        mass: ``positive`` values, as in the paper, or ``magnitude``. Quantus divides signed sums, which agrees on
            non-negative maps and leaves ``[0, 1]`` on others.
    """

    mass: Literal["positive", "magnitude"] = "positive"

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor, region: Tensor) -> Tensor:
        shares = ops.distribution(maps.clamp(min=0) if self.mass == "positive" else maps)
        return (shares * region.flatten(1)).sum(1).clamp(max=1)


@METRICS.register(
    "localisation-error",
    paper="Cao et al. 2015; Table 2 of Zhang et al. 2020; Dabkowski and Gal 2017",
    needs=("regions",),
)
@dataclass(frozen=True)
class LocalisationError(Localisation):
    """Whether the thresholded map's box misses the object's: 1 if their IoU is below ``overlap``, else 0.

    The map's box is the tightest one around all pixels that reach the threshold; the object's is the tightest around
    its region. The papers tune ``threshold`` per interpreter on held-out images and report the mean of this in percent.

    Args:
        threshold: a share: of the way from the map's smallest to its largest value, or of its mean (``of``).
        of: ``range``: value thresholding of the min-max rescaled map; ``mean``: ``threshold`` times its mean.
        overlap: IoU from which the box counts as right.
    """

    threshold: NonNegative = 0.5
    of: Literal["range", "mean"] = "range"
    overlap: Fraction = 0.5

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, 1)

    def _measure(self, maps: Tensor, region: Tensor) -> Tensor:
        scaled = ops.minmax(maps)
        level = self.threshold * (1 if self.of == "range" else scaled.mean((1, 2), keepdim=True))
        # If no value reaches the threshold, the box is that of the peak: an empty box would always be a miss.
        box = box_of(scaled >= torch.minimum(scaled.amax((1, 2), keepdim=True), torch.as_tensor(level).to(scaled)))
        return (box_iou(box, box_of(region)) < self.overlap).to(maps.dtype)


def box_of(region: Tensor) -> Tensor:
    """Tightest boxes ``[B, 4]`` around the pixels of bool ``[B, H, W]``: left, top, right, bottom (ends exclusive)."""
    edges = []
    for along in (1, 2):
        hit = region.any(along).int()
        edges += [hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)]
    return torch.stack([edges[0], edges[2], edges[1], edges[3]], 1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``[B, 4]``, pair by pair, ``[B]`` in float64."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).double()
    both = sides.prod(1)
    areas = [(box[:, 2:] - box[:, :2]).double().prod(1) for box in (a, b)]
    return both / (areas[0] + areas[1] - both)
