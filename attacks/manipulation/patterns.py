"""Goal maps that do not depend on the image: shapes on any grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustexplain import maps as ops

Shape = Literal["square", "circle", "cross", "frame", "half"]
"""A square in the lower right quarter, a circle or a cross in the middle, a frame, the left half."""


def pattern(like: Tensor, shape: Shape) -> Tensor:
    """The shape as maps of zeros and ones, ``[B, h, w]``, on the grid of ``like`` ``[B, h, w]``."""
    height, width = like.shape[-2:]
    down = torch.linspace(-1, 1, height, dtype=like.dtype, device=like.device)[:, None].expand(height, width)
    across = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)[None].expand(height, width)
    if shape == "frame":
        inside = ops.frame(like) > 0
    elif shape == "square":
        inside = (down > 0.1) & (across > 0.1)
    elif shape == "circle":
        inside = down.square() + across.square() <= 0.3
    elif shape == "cross":
        inside = (down.abs() < 0.25) | (across.abs() < 0.25)
    else:
        inside = across < 0
    return inside.to(like).expand(len(like), -1, -1)
