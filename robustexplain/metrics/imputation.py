"""Linear imputation of pixels from their neighbours (Rong et al. 2022, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
"""Weights of a pixel's neighbours in the authors' code; those outside the image are left out."""
_TOLERANCE = 1e-5
"""Largest residual at a pixel."""


def imputed(x: Tensor, missing: Tensor) -> Tensor:
    """Images in which every missing pixel is the weighted mean of its neighbours, missing or not.

    One sparse, symmetric, positive definite system an image and channel, solved by conjugate gradients: a convolution
    a step for the whole batch. A channel that has converged stays as it is, so images do not depend on their batch.

    Args:
        x: ``[B, C, H, W]``.
        missing: bool ``[B, H, W]``; an image of which nothing is left becomes its mean colour.
    """
    holes = missing[:, None].to(x).expand_as(x)
    known, count = 1 - holes, (1 - holes).sum((2, 3), keepdim=True)
    mean = torch.where(count > 0, (x * known).sum((2, 3), keepdim=True) / count.clamp(min=1), x.mean((2, 3), True))
    degree = _around(torch.ones_like(x[:1, :1]))
    # Unknown u on the holes: degree u - sum of neighbours = 0. The start is the mean colour.
    values = torch.where(holes > 0, mean, x)
    residual = holes * (_around(values) - degree * values)
    direction, size = residual, _dot(residual, residual)
    for _ in range(int(missing.flatten(1).sum(1).max())):
        going = residual.abs().amax((2, 3), keepdim=True) > _TOLERANCE
        if not going.any():
            break
        pushed = holes * (degree * direction - _around(direction))
        # The largest step of a converged channel is 0.
        step = going * size / _dot(direction, pushed).clamp(min=torch.finfo(x.dtype).tiny)
        values, residual = values + step * direction, residual - step * pushed
        grown = _dot(residual, residual)
        direction = residual + going * grown / size.clamp(min=torch.finfo(x.dtype).tiny) * direction
        size = grown
    return values


def _around(values: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbours; the image ends at its border."""
    kernel = values.new_tensor(NEIGHBOURS)[None, None]
    return F.conv2d(values.flatten(0, 1)[:, None], kernel, padding=1).reshape(values.shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)
