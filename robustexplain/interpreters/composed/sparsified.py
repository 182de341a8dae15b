"""Sparsified SmoothGrad: averages of cut maps, whose largest values provably stay among the largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...fields import Count, Natural, Positive
from ...maps import positive
from ...registry import INTERPRETERS
from ..base import wide_dtype
from ..certificate import Certificate
from ..gradients.integrated import total
from .binomial import Bound, bounds, slack
from .certified import Inner
from .noisy_copies import MarkingCopies, PredictionOf, cells, copy_maps, kept, marked, number_of_cells


@dataclass(frozen=True)
class SparsifiedSettings:
    """How maps are cut and averaged (Levine et al. 2019), and when so few draws could not prove anything.

    Args:
        samples: noisy copies (the paper: 8192).
        sigma: standard deviation of the noise, in units of ``[0, 1]`` pixels.
        keep: share of each copy's cells that become 1 (the paper's tau).
        top: share of the cells whose staying is certified (the paper: 0.2).
        radius: L2, in units of ``[0, 1]`` pixels, for which it is (the paper: 0.03).
        alpha: the largest chance that what is certified of an input is wrong (the paper: 0.05).
        bound: of each cell's share over all copies: ``hoeffding`` (the paper) or ``clopper-pearson``, exact.
        grid: cells a side, each the mean magnitude of its pixels; 0: every pixel. The bound widens with their number.
        prediction_of: ``copy`` explains each copy's own prediction (the paper), so that what is certified holds
            whatever is predicted; ``input`` that of the input.
        batch_size: largest number of copies in one pass of the model.

    Raises:
        InputError: so few draws that nothing could be certified, a grid that does not fit the images.
    """

    samples: Count = 1024
    sigma: Positive = 0.1
    keep: Inner = 0.1
    top: Inner = 0.2
    radius: Positive = 0.03
    alpha: Inner = 0.05
    bound: Bound = "hoeffding"
    grid: Natural = 14
    prediction_of: PredictionOf = "copy"
    batch_size: Count = 64

    def check_draws(self, size: tuple[int, ...] | None = None) -> None:
        """Refuse settings that could not certify anything about images of ``size``; on the grid for ``None``."""
        number = self.grid * self.grid or 2
        if size is not None:
            number = number_of_cells(type(self).__name__, self.grid, size)
        if self._proves(self.samples, number):
            return
        enough = next((n for n in (self.samples << i for i in range(1, 30)) if self._proves(n, number)), None)
        advice = f"{enough} would do, or a smaller grid" if enough else "a larger sigma, or a smaller radius"
        raise InputError(
            f"{type(self).__name__}: {self.samples} draws certify nothing at alpha {self.alpha} over {number} cells at "
            f"radius {self.radius} with sigma {self.sigma}: {advice}"
        )

    def _proves(self, samples: int, number: int) -> bool:
        """Whether a cell that every copy marks can be told from one that none does."""
        ends = torch.tensor(slack(samples, self.alpha / (2 * number), self.bound), dtype=torch.float64)
        return bool(apart(positive(1 - ends), ends, self.radius, self.sigma))


@INTERPRETERS.register("sparsified", paper="Levine et al. 2019")
@dataclass(frozen=True, eq=False)
class Sparsified(SparsifiedSettings, MarkingCopies):
    """The share of noisy copies that have a cell among their largest ones, with a bound on how many of its top stay.

    With a gradient of the logit as ``base`` it is Sparsified SmoothGrad. Of the sorted shares, the ``i``-th largest and
    the ``i``-th after the top from the other end are compared: the pairs that no change within ``radius`` can exchange
    are as many cells of the top as stay at least. The certificate is of this average, not of ordinary SmoothGrad.

    Departure: channels become one map first; the paper ranks every channel of every pixel.

    Args:
        base: any interpreter of images; it must explain ``model``.
        seed: of the noise, which is the same for every input.
    """

    def _marks(self, x: Tensor, target: Tensor | None, graph: bool) -> Tensor:
        """``[b, h, w]``: how many copies mark each cell."""
        # Whole numbers above 256 do not fit bfloat16.
        wide = wide_dtype(x)
        found = copy_maps(self, x, target, graph, self.sigma)
        parts = (marked(cells(maps, x.shape[-2:], self.grid), self.keep, graph).sum(0, dtype=wide) for maps in found)
        return total(parts)

    def _shares(self, marks: Tensor) -> Tensor:
        return marks / self.samples

    def _certificate(self, marks: Tensor) -> Certificate:
        hits = marks.flatten(1).round().long().sort(1, descending=True).values
        number = hits.shape[1]
        # Two bounds a cell, all of them right with a chance of 1 - alpha.
        low, high = (b.to(hits.device) for b in bounds(self.samples, self.alpha / (2 * number), self.bound))
        k = kept(self.top, number)
        up, down = low[hits[:, :k]], high[hits[:, k : 2 * k]]
        # Where fewer cells are left than the top has, the first of it have no counterpart.
        down = F.pad(down, (0, k - down.shape[1]), value=-1.0).flip(1)
        held = apart(up, down, self.radius, self.sigma) | (down < 0)
        overlap = held.double().mean(1)
        return Certificate(self.radius, self.alpha, marks.float() / self.samples, overlap=overlap, top=k)


def apart(up: Tensor, down: Tensor, radius: float, sigma: float) -> Tensor:
    """Where ``Phi(Phi^-1(up) - 2 radius / sigma) > down``: no change within ``radius`` brings ``down`` above ``up``."""
    held: Tensor = torch.special.ndtr(torch.special.ndtri(up) - 2 * radius / sigma) > positive(down)
    return held
