"""Occlusion: cover the image window by window and measure how far the class score falls."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import Kind
from ...door import answer
from ...errors import InputError
from ...fields import Count
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class
from .removal import Fill, Score, all_perturbed_scores, score


@INTERPRETERS.register("occlusion", paper="Zeiler and Fergus 2014, section 4.2")
@dataclass(frozen=True, eq=False)
class Occlusion(Interpreter):
    """How far the class's score falls when a window is covered, averaged over the windows that cover a pixel.

    Windows start at multiples of ``stride`` and are cut off at the right and lower border, so that every pixel is
    covered (captum's convention). With ``window=1, stride=1`` it is leave-one-out (Li et al. 2016). Not differentiable:
    the graphs of all passes would have to be kept.

    Args:
        window: side of the covered square in pixels; default an eighth of the shorter side.
        stride: step in pixels; default half a window.
        fill: what covers the window.
        of: the score that falls.
        batch_size: images a forward pass, at most (or the batch, if that is larger).
        seed: of a noise fill.
    """

    window: Count | None = None
    stride: Count | None = None
    fill: Fill = field(default_factory=Fill)
    of: Score = "probability"
    batch_size: Count = 256
    seed: int = 0

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes, images = explained_class(logits, target), x.detach()
        window, stride = self._sizes(images)
        rows, columns = (_covers(side, window, stride, images) for side in images.shape[-2:])
        number = len(rows) * len(columns)

        def keep(part: slice) -> Tensor:
            index = torch.arange(part.start, part.stop, device=x.device)
            return 1 - rows[index // len(columns)][:, :, None] * columns[index % len(columns)][:, None]

        fill = self.fill(images, self.seed)
        scores = all_perturbed_scores(self.model, images, fill, keep, number, classes, self.of, self.batch_size)
        falls = score(logits.detach(), classes, self.of)[:, None] - scores
        falls = falls.reshape(-1, len(rows), len(columns))
        # A window is a product of two intervals, so sums over windows factor into rows and columns.
        total = torch.einsum("brc,rh,cw->bhw", falls, rows.to(falls), columns.to(falls))
        maps = total / (rows.sum(0)[:, None] * columns.sum(0)).to(falls)
        return Explanation(logits, maps.to(x.dtype))

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        side = min(x.shape[-2:])
        window = self.window or max(1, side // 8)
        stride = self.stride or max(1, window // 2)
        if window > side:
            raise InputError(f"a window of {window} pixels does not fit into images of {list(x.shape[-2:])}")
        if stride > window:
            raise InputError(f"a stride of {stride} leaves gaps between windows of {window} pixels: at most {window}")
        return window, stride


def _covers(side: int, window: int, stride: int, like: Tensor) -> Tensor:
    """``[n, side]``: 1 where the n-th interval covers the pixel."""
    starts = torch.arange(1 + math.ceil((side - window) / stride), device=like.device) * stride
    pixels = torch.arange(side, device=like.device)
    covered = (pixels >= starts[:, None]) & (pixels < starts[:, None] + window)
    return covered.to(torch.float32)
