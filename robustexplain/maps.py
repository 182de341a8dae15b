"""Operations on attribution maps ``[B, H, W]``: batched, differentiable, defined on degenerate maps.

Rescaling is the choice of a metric or an objective, never of an interpreter; papers differ in it, and figures under
different rescalings do not compare.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Rescale = Literal["none", "minmax", "absmax", "sum"]


def per_sample(values: Tensor) -> Tensor:
    """Flatten everything but the batch: ``[B, ...]`` to ``[B, N]``."""
    return values.flatten(1)


def expand(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` with trailing dimensions of one, to broadcast against ``like``."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def minmax(maps: Tensor) -> Tensor:
    """Each map to ``[0, 1]``: ``(m - min) / (max - min)``. A constant map becomes all zeros, with zero gradient.

    ADV2's code divides without a guard, so a constant map turns into NaN and poisons the sign step.
    """
    flat = per_sample(maps)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    spread = high - low
    alive = spread > 0
    scaled = torch.where(alive, (flat - low) / torch.where(alive, spread, torch.ones_like(spread)), flat * 0)
    return scaled.reshape(maps.shape)


def absmax(maps: Tensor) -> Tensor:
    """Each map divided by its largest magnitude, to ``[-1, 1]``; an all-zero map stays zero."""
    flat = per_sample(maps)
    return (flat / _guard(flat.abs().amax(1, keepdim=True))).reshape(maps.shape)


def unit_sum(maps: Tensor) -> Tensor:
    """Each map's magnitudes divided by their sum (Dombrowski et al., Ghorbani et al.); an all-zero map stays zero."""
    flat = per_sample(maps).abs()
    return (flat / _guard(flat.sum(1, keepdim=True))).reshape(maps.shape)


def rescale(maps: Tensor, how: Rescale) -> Tensor:
    """Rescale every map on its own: ``none``, ``minmax``, ``absmax`` or ``sum``."""
    if how == "none":
        return maps
    return {"minmax": minmax, "absmax": absmax, "sum": unit_sum}[how](maps)


def resize(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resize ``[B, h, w]`` to ``[B, H, W]``; the same tensor if the size is right already."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def pool(maps: Tensor, factor: int) -> Tensor:
    """Average-pool each map by ``factor`` (ADV2's GRAD compares maps after 4x4 pooling); 1 leaves it alone."""
    return maps if factor == 1 else F.avg_pool2d(maps[:, None], factor)[:, 0]


def binarise(maps: Tensor, threshold: float) -> Tensor:
    """Where the min-max rescaled map reaches ``threshold``: bool, the shape of ``maps``."""
    return minmax(maps) >= threshold


def total_variation(maps: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, ``[B]`` (Dabkowski and Gal 2017, r_tv)."""
    down = (maps[:, 1:] - maps[:, :-1]).square().flatten(1).mean(1)
    right = (maps[:, :, 1:] - maps[:, :, :-1]).square().flatten(1).mean(1)
    return down + right


def _guard(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
