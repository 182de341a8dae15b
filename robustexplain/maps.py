"""Operations on attribution maps ``[B, H, W]``: batched, differentiable, defined on degenerate maps.

Rescaling is the choice of a metric or an objective, never of an interpreter; papers differ in it, and figures under
different rescalings do not compare.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
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


def positive(values: Tensor) -> Tensor:
    """``max(v, 0)``, not by a rectifier: a swap of the network's must leave a method's or an objective's own alone."""
    return torch.where(values > 0, values, 0)


def clipped(values: Tensor) -> Tensor:
    """Values clipped to ``[0, 1]``; at 0 and 1 themselves the gradient goes through.

    Not by ``clamp``: a swap of the network's rectifiers would take it for one of them, and its gradient is zero at the
    bounds, where the black and white pixels of images are.
    """
    return torch.where(values < 0, 0, torch.where(values > 1, 1, values))


def minmax(maps: Tensor) -> Tensor:
    """Each map to ``[0, 1]``: ``(m - min) / (max - min)``. A constant map becomes all zeros, with zero gradient.

    ADV2's code divides without a guard, so a constant map turns into NaN and poisons the sign step.
    """
    flat = per_sample(maps)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    spread = high - low
    # Divided by infinity, a constant map and its gradient are zero.
    return ((flat - low) / torch.where(spread > 0, spread, torch.inf)).reshape(maps.shape)


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


def distribution(maps: Tensor) -> Tensor:
    """Each map's magnitudes as shares that sum to one, ``[B, N]``; an all-zero map is uniform.

    The zero map's gradient is zero.
    """
    flat = per_sample(maps).abs()
    total = flat.sum(1, keepdim=True)
    # A zero map is replaced by one of ones; the gradient of the magnitudes is zero there.
    empty = (total == 0).to(flat.dtype)
    return (flat + empty) / (total + empty * flat.shape[1])


def entropy(maps: Tensor) -> Tensor:
    """``-sum p log p`` of :func:`distribution`, in nats, ``[B]``: 0 for one pixel, ``log N`` for a flat or zero map."""
    p = distribution(maps)
    # The smallest number stands in where p = 0, so that neither the value nor the gradient meets log 0.
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(1)


def center_of_mass(maps: Tensor) -> Tensor:
    """Row and column of the centre of the magnitudes, ``[B, 2]``, pixels counted from 0.

    A delta at ``(i, j)`` gives ``(i, j)``; a flat or an all-zero map gives the middle of the grid. Ghorbani et al.
    (2019, section 3) truncate to whole pixels, which we do not; Heo et al. count from 1.
    """
    shares = distribution(maps).reshape(maps.shape)
    rows, columns = (torch.arange(n, device=maps.device, dtype=maps.dtype) for n in maps.shape[1:])
    return torch.stack([(shares.sum(2) * rows).sum(1), (shares.sum(1) * columns).sum(1)], 1)


def top_k_count(k: float, pixels: int) -> int:
    """How many of ``pixels`` a setting ``k`` means: a count from 1 on, a share below 1 (rounded down, at least one)."""
    return max(1, min(int(k) if k >= 1 else math.floor(k * pixels + 1e-9), pixels))


def top_k(maps: Tensor, k: int) -> Tensor:
    """Membership ``[B, N]`` in ``[0, 1]`` of each map's ``k`` largest values; every row sums to ``k``.

    Values tied at the last place share the places left, so membership does not depend on the order of pixels.
    """
    flat = per_sample(maps)
    last = kth_largest(flat.detach(), k)
    above, tied = flat > last, flat == last
    places = (k - above.sum(1, keepdim=True)).to(flat.dtype) / tied.sum(1, keepdim=True)
    return above.to(flat.dtype) + tied * places


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The ``k``-th largest number of each row of ``[B, N]``, ``[B, 1]``; the rows carry no gradient."""
    if _numpy_sorts(rows):
        place = rows.shape[1] - k
        return torch.from_numpy(np.partition(rows.numpy(), place, axis=1)[:, place : place + 1])
    return rows.topk(k, dim=1).values[:, -1:]


def sign_vector(maps: Tensor) -> Tensor:
    """``[B, N]``: the sign where ``|h| > mean|h| + std|h|``, 0 elsewhere (Heo et al. 2019, arXiv v1 section 4.2).

    The deviation is the population's (the paper does not say); a map of one magnitude gives zeros.
    """
    flat = per_sample(maps)
    size = flat.abs()
    chosen = (size > size.mean(1, keepdim=True) + size.std(1, correction=0, keepdim=True)) & (
        size.amax(1, keepdim=True) > size.amin(1, keepdim=True)
    )
    return flat.sign() * chosen


def frame(like: Tensor) -> Tensor:
    """Heo et al.'s frame ``[H, W]``: 1 on a border of a seventh of each side, 0 inside.

    The width is ``side // 7``, as in the authors' code, and at least one pixel; the paper's inequality (Remark 2) gives
    the same where 7 divides the side and is lopsided elsewhere.
    """
    height, width = like.shape[-2:]
    mask = like.new_ones(height, width)
    down, across = max(1, height // 7), max(1, width // 7)
    mask[down : height - down, across : width - across] = 0
    return mask


def ascending(rows: Tensor) -> Tensor:
    """Each row of ``[B, N]`` sorted; differentiable."""
    if rows.requires_grad:
        return rows.gather(1, rows.detach().argsort(1))
    return torch.from_numpy(np.sort(rows.numpy(), axis=1)) if _numpy_sorts(rows) else rows.sort(1).values


def _numpy_sorts(rows: Tensor) -> bool:
    # On a CPU numpy sorts several times as fast as torch; it knows no bfloat16.
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64, torch.int32, torch.int64)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two ``[B, N]``, ``[B]``; NaN, with zero gradient, if a row is constant."""
    (a, norm_a), (b, norm_b) = _centred(a), _centred(b)
    # A norm of 0 stands for a constant row.
    varies = (norm_a > 0) & (norm_b > 0)
    value = ((a * b).sum(1) / torch.where(varies, norm_a * norm_b, 1)).clamp(-1, 1)
    return torch.where(varies, value, torch.nan)


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Rows less their means, and their norms. The scale cancels: it only keeps squares from under- or overflowing.
    low, high = rows.detach().amin(1, keepdim=True), rows.detach().amax(1, keepdim=True)
    varies = high > low
    scaled = rows / torch.where(varies, torch.maximum(high, -low), 1)
    centred = scaled - scaled.mean(1, keepdim=True)
    return centred, torch.where(varies[:, 0], torch.linalg.vector_norm(centred, dim=1), 0)


def _guard(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
