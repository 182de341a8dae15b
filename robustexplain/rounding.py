"""Half precision: bounds that hold to the last representable number, and sums that do not over- or underflow.

float32 and float64 pass through unchanged, bit for bit: there a bound is missed by one rounding at most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .maps import clipped


def is_half(x: Tensor) -> bool:
    """Whether ``x`` has less precision than float32."""
    return x.dtype in (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least, for sums, squares and small constants that half precision cannot hold."""
    return x.float() if is_half(x) else x


def like_weights(x: Tensor, module: nn.Module) -> Tensor:
    """``x`` in the precision of the module's weights, which need not be that of the system it stands in."""
    return x.to(next(module.parameters()).dtype)


def toward(x: Tensor, wanted: Tensor) -> Tensor:
    """``wanted`` in the dtype of ``x``, rounded towards ``x``: no entry is farther from ``x`` than it was.

    Args:
        x: in half precision.
        wanted: like ``x``, in float32 or float64.
    """
    near = wanted.to(x.dtype)
    exact, rounded = wanted.double() - x.double(), near.double() - x.double()
    return torch.where(rounded.abs() > exact.abs(), torch.nextafter(near, x.expand_as(near)), near)


def moved_by(x: Tensor, change: Tensor) -> Tensor:
    """``x + change``, clipped to ``[0, 1]``, in the dtype of ``x`` and no farther from it than ``change``."""
    moved = clipped(wide(x) + change)
    if not is_half(x):
        return moved
    near = moved.to(x.dtype)
    # The value is rounded towards x; the gradient goes through.
    return near + (toward(x, moved.detach()) - near.detach())
