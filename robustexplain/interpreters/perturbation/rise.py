"""RISE: the average of random masks, each weighted by the class score of the masked image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import annotated_types as at
import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import Kind
from ...door import answer
from ...fields import Count
from ...random_streams import generator
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class, wide_dtype
from ..saturation import warn_of_equal_scores
from .removal import Fill, Score, chunks, perturbed_scores


@INTERPRETERS.register("rise", paper="Petsiuk et al. 2018, eq. 6")
@dataclass(frozen=True, eq=False)
class RISE(Interpreter):
    """Randomised input sampling: ``1 / (p N) sum_i f_c(x M_i) M_i`` over random smooth masks (Petsiuk et al., eq. 6).

    A mask is a ``grid x grid`` of random zeros and ones, enlarged bilinearly to one cell more than the image and
    cropped at a random position (section 3.2). The masks depend on ``seed`` alone and are the same for all samples.
    The map's noise falls with ``1 / sqrt(samples)``. Not differentiable: the graphs of all passes would have to be
    kept.

    Args:
        samples: ``N`` masks; the paper uses 4000 to 8000 at 224 pixels.
        grid: cells a side of the coarse mask.
        keep: p, the probability that a cell is kept.
        fill: what replaces pixels where the mask is 0; black, as in the paper.
        of: the score that weights the masks.
        batch_size: images a forward pass, at most (or the batch, if that is larger).
        seed: of the masks.
    """

    samples: Count = 4000
    grid: Count = 7
    keep: Annotated[float, at.Gt(0), at.Lt(1)] = 0.5
    fill: Fill = field(default_factory=lambda: Fill(value=0.0))
    of: Score = "probability"
    batch_size: Count = 256
    seed: int = 0

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes, images = explained_class(logits, target), x.detach()
        fill, cells, offsets = self.fill(images, self.seed), *self._draws()
        total, seen = torch.zeros_like(images[:, 0], dtype=wide_dtype(images)), []
        for part in chunks(self.samples, len(images), self.batch_size):
            masks = self._enlarged(cells[part], offsets[part], images).to(total.dtype)
            scores = perturbed_scores(self.model, images, fill, masks, classes, self.of)
            scores = scores.to(total.dtype)  # a model may answer in another dtype than that of its input
            total += torch.einsum("bn,nhw->bhw", scores, masks)
            seen.append(scores)
        if self.of == "probability":
            warn_of_equal_scores(torch.cat(seen, 1))
        return Explanation(logits, (total / (self.keep * self.samples)).to(x.dtype))

    def _draws(self) -> tuple[Tensor, Tensor]:
        """Kept cells, bool ``[N, grid, grid]``, and the offset of each crop: ``[N, 2]``, in shares of a cell."""
        source = generator(self.seed, "rise")
        cells = torch.rand(self.samples, self.grid, self.grid, generator=source, dtype=torch.float64) < self.keep
        return cells, torch.rand(self.samples, 2, generator=source, dtype=torch.float64)

    def _enlarged(self, cells: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        """Masks ``[n, H, W]`` in ``[0, 1]``."""
        height, width = x.shape[-2:]
        sides = math.ceil(height / self.grid), math.ceil(width / self.grid)
        large = [(self.grid + 1) * side for side in sides]
        smooth = F.interpolate(cells[:, None].to(x.device, wide_dtype(x)), large, mode="bilinear", align_corners=False)
        top, left = ((offsets[:, axis] * side).long().to(x.device) for axis, side in enumerate(sides))
        rows = top[:, None] + torch.arange(height, device=x.device)
        columns = left[:, None] + torch.arange(width, device=x.device)
        index = torch.arange(len(cells), device=x.device)
        return smooth[index[:, None, None], 0, rows[:, :, None], columns[:, None]]
