"""JPEG compression and decompression, differentiably."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import maps as ops
from ..autograd.straight_through import rounded
from ..errors import InputError
from ..registry import TRANSFORMS
from .base import Transform, within

# The example tables of the standard (ITU-T T.81, tables K.1 and K.2), which libjpeg scales by the quality.
_LUMA = """
16 11 10 16 24 40 51 61       12 12 14 19 26 58 60 55       14 13 16 24 40 57 69 56       14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77     24 35 55 64 81 104 113 92     49 64 78 87 103 121 120 101   72 92 95 98 112 100 103 99
"""
_CHROMA = """
17 18 24 47 99 99 99 99       18 21 26 66 99 99 99 99       24 26 56 99 99 99 99 99       47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99       99 99 99 99 99 99 99 99       99 99 99 99 99 99 99 99       99 99 99 99 99 99 99 99
"""
# JFIF: red, green and blue to luma and two chromas around 128.
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_PASS = 4 * math.sqrt(8)
"""Scale of what libjpeg's transform keeps after its first pass: two bits more than whole numbers."""
_TIE = 1e-4
"""Quantisation rounds halves away from zero; coefficients are eighths, so nothing else is that near to a half."""
_FROM_YCC = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


@TRANSFORMS.register("jpeg", paper="ITU-T T.81; Guo et al. 2018 (as a defense)")
class JPEG(Transform):
    """Baseline JPEG as libjpeg does it: 8-bit colours, chroma at half the size (4:2:0), 8 x 8 DCT, quantisation.

    Colour conversion, subsampling, transform, the standard's tables scaled by the quality, and back with the smooth
    ("fancy") chroma upsampling of libjpeg's decoder; entropy coding loses nothing and is left out. All rounding is that
    of :func:`~robustexplain.autograd.straight_through.rounded`. What a real encoder and decoder give differs where
    their integer arithmetic rounds otherwise: by 0.1 of a level of 255 on average, and by a step of quantisation in
    single blocks; colour images of less than 16 pixels a side, which libjpeg upsamples otherwise, by ten levels.
    Images whose sides are no multiple of 16 (grey: 8) are continued by their last pixels, as there.

    Args:
        quality: from 1 to 100, as libjpeg scales it.
    """

    form: ClassVar[str] = "jpeg-QUALITY"
    rounds: ClassVar[bool] = True

    def __init__(self, quality: int) -> None:
        super().__init__(f"jpeg-{quality}")
        within("JPEG", "quality", quality, 1, 100)
        self.quality = quality

    def forward(self, x: Tensor) -> Tensor:
        """The images as they come back.

        Raises:
            InputError: neither one channel nor three.
        """
        if x.shape[1] not in (1, 3):
            raise InputError(f"JPEG takes grey or RGB images, got {x.shape[1]} channels")
        # Half precision has fewer levels than the images.
        with torch.autocast(x.device.type, enabled=False):
            return self._levels(rounded(255 * x.to(torch.promote_types(x.dtype, torch.float32)))).to(x.dtype)

    def _levels(self, levels: Tensor) -> Tensor:
        height, width = levels.shape[-2:]
        if levels.shape[1] == 1:
            return ops.clipped(self._coded(_continued(levels, 8), _LUMA)[..., :height, :width] / 255)
        ycc = rounded(_mixed(_continued(levels, 16), _TO_YCC, (0.0, 128.0, 128.0)))
        luma = self._coded(ycc[:, :1], _LUMA)[..., :height, :width]
        chroma = self._coded(_halved(ycc[:, 1:]), _CHROMA)[..., : -(-height // 2), : -(-width // 2)]
        back = torch.cat([luma, _doubled(chroma)[..., :height, :width] - 128], 1)
        return ops.clipped(rounded(_mixed(back, _FROM_YCC)) / 255)

    def _coded(self, x: Tensor, table: str) -> Tensor:
        """What quantised coefficients of each block of ``x`` (levels of 255) give back."""
        cosine, steps = _cosines(x), self._steps(table, x)
        blocks = (x - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
        # One axis at a time, each result rounded to the bits that libjpeg's integers keep.
        half = rounded(_PASS * blocks @ cosine.T) / _PASS
        coefficients = rounded(8 * (cosine @ half)) / 8
        away = torch.where(coefficients < 0, -_TIE, _TIE)
        kept = rounded(coefficients / steps + away) * steps
        half = rounded(_PASS * (cosine.T @ kept)) / _PASS
        blocks = rounded(half @ cosine).transpose(3, 4)
        return 255 * ops.clipped((blocks.flatten(4).flatten(2, 3) + 128) / 255)

    def _steps(self, table: str, like: Tensor) -> Tensor:
        scale = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        steps = [min(max((int(value) * scale + 50) // 100, 1), 255) for value in table.split()]
        # Four rows of the table stand in one line.
        return like.new_tensor(steps).view(8, 8)


def _cosines(like: Tensor) -> Tensor:
    """The orthonormal DCT-II of eight numbers, ``[8, 8]``."""
    rows = [[math.cos(math.pi * (2 * i + 1) * u / 16) / 2 for i in range(8)] for u in range(8)]
    rows[0] = [math.sqrt(1 / 8)] * 8
    return like.new_tensor(rows)


def _continued(x: Tensor, multiple: int) -> Tensor:
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _mixed(x: Tensor, matrix: tuple[tuple[float, ...], ...], offset: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", x.new_tensor(matrix), x) + x.new_tensor(offset)[:, None, None]


def _halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 levels, rounded down and up in turn from column to column, as libjpeg does."""
    total = x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
    bias = 1 + torch.arange(total.shape[3], device=x.device) % 2
    # Rounding quarters less 3/8 is rounding them down.
    return rounded((total + bias) / 4 - 3 / 8)


def _doubled(x: Tensor) -> Tensor:
    """Twice the size, each level 9/16, 3/16, 3/16 and 1/16 of the four around it; borders are repeated."""
    x = _between(_between(x, 2), 3)
    bias = 8 - torch.arange(x.shape[3], device=x.device) % 2
    # Rounding sixteenths less 15/32 is rounding them down.
    return rounded((x + bias) / 16 - 15 / 32)


def _between(x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    before = x.index_select(dim, torch.arange(-1, size - 1, device=x.device).clamp(0))
    after = x.index_select(dim, torch.arange(1, size + 1, device=x.device).clamp(max=size - 1))
    return torch.stack([3 * x + before, 3 * x + after], dim + 1).flatten(dim, dim + 1)
