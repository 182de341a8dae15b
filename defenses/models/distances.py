"""Distances of maps, of each sample, for losses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustexplain.maps import correlation

Similarity = Literal["pearson", "cosine"]
"""Pearson's correlation or the cosine of the flattened maps."""


def dissimilarity(a: Tensor, b: Tensor, how: Similarity) -> Tensor:
    """``1 - similarity`` of ``[b, ...]``, in ``[0, 2]``; 0 without a gradient where a map is zero, or constant.

    Args:
        a: maps.
        b: others.
        how: the similarity; neither sees the maps' scale.
    """
    a, b = a.flatten(1), b.flatten(1)
    if how == "cosine":
        return 1 - cosine(a, b)
    found = correlation(a, b)
    return torch.where(found.isnan(), 0, 1 - found)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the rows of two ``[b, N]``, ``[b]``; 1 where a row is zero. However small the rows are."""
    sizes = [rows.detach().abs().amax(1, keepdim=True) for rows in (a, b)]
    some = (sizes[0] > 0) & (sizes[1] > 0)
    # The scale cancels: squares of tiny gradients underflow. A row of zeros has no direction, and its norm no gradient.
    a, b = (torch.where(some, v / torch.where(size > 0, size, 1), 1) for v, size in zip((a, b), sizes, strict=True))
    found: Tensor = (a * b).sum(1) / (torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1))
    return found
