"""Certified maps: which cells no small change of the input can move in or out of the most important ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import annotated_types as at
import torch
from torch import Tensor

from ...errors import FieldError, InputError
from ...fields import Count, Natural, Positive
from ...registry import INTERPRETERS
from ..certificate import ABSTAIN, Certificate
from .binomial import Correction, draws_needed, rejected, tails
from .noisy_copies import MarkingCopies, PredictionOf, cells, copy_maps, marked, number_of_cells

Inner = Annotated[float, at.Gt(0), at.Lt(1)]
"""A share that is neither none nor all."""
Majority = Annotated[float, at.Gt(0.5), at.Lt(1)]
"""A share of more than half."""


@dataclass(frozen=True)
class CertifiedSettings:
    """How maps are certified (Anani et al. 2025), and when so few draws could not certify anything.

    Args:
        samples: noisy copies.
        choose: how many of them, the first, choose each cell's class; the others test it.
        sigma: standard deviation of the noise, in units of ``[0, 1]`` pixels (the paper: 0.15, 0.25, 0.33).
        keep: share of the cells of each copy's map that count as important (the paper: 0.5, 0.25, 0.05).
        tau: what share of copies must agree; the radius is ``sigma * Phi^-1(tau)``.
        alpha: the largest chance of any wrong statement about an input, over all its cells.
        correction: how the cells' tests share ``alpha``: ``bonferroni`` (the paper) or ``holm``, never worse.
        grid: cells a side, each the mean magnitude of its pixels; 0: every pixel (the paper). Fewer cells need fewer
            draws, and their means are steadier.
        prediction_of: ``input`` explains the prediction for the input on every copy (the paper): what is proved holds
            for inputs with the same prediction. With ``copy``, each copy's own, it holds whatever is predicted.
        batch_size: largest number of copies in one pass of the model.

    Raises:
        InputError: too few draws for ``alpha``, a grid that does not fit the images.
    """

    samples: Count = 100
    choose: Count = 10
    sigma: Positive = 0.15
    keep: Inner = 0.25
    tau: Majority = 0.75
    alpha: Inner = 0.001
    correction: Correction = "bonferroni"
    grid: Natural = 0
    prediction_of: PredictionOf = "input"
    batch_size: Count = 64

    @property
    def radius(self) -> float:
        """L2, in units of ``[0, 1]`` pixels."""
        return self.sigma * float(torch.special.ndtri(torch.tensor(self.tau, dtype=torch.float64)))

    def check_draws(self, size: tuple[int, ...] | None = None) -> None:
        """Refuse settings that could not certify a single cell of images of ``size``; of any size for ``None``."""
        tests = self.samples - self.choose
        if tests < 1:
            wanted = f"must be below samples ({self.samples}), so that some are left to test, got {self.choose}"
            raise FieldError(type(self).__name__, "choose", wanted)
        number = 1 if size is None else number_of_cells(type(self).__name__, self.grid, size)
        number = max(number, self.grid * self.grid)
        needed = draws_needed(self.tau, self.alpha / number)
        if tests < needed:
            over = f"over {number} cells" if number > 1 else "of a single cell"
            advice = ", or grid smaller" if self.grid or size else ", and more for more cells"
            raise InputError(
                f"{type(self).__name__}: {self.samples} draws, {tests} of which test, certify nothing at alpha "
                f"{self.alpha} {over} with tau {self.tau}: samples must be at least {needed + self.choose}{advice}"
            )


@INTERPRETERS.register("certified", paper="Anani et al. 2025")
@dataclass(frozen=True, eq=False)
class Certified(CertifiedSettings, MarkingCopies):
    """The share of noisy copies that have a cell among their most important ones, with what is proved of each cell.

    Each copy's map by ``base`` is made absolute, averaged over cells, and cut to its ``keep`` largest ones. A cell is
    certified as important (or not) if the test rejects, at ``alpha`` over all cells, that at most ``tau`` of all
    copies find so; then more than half do at every input within ``sigma * Phi^-1(tau)`` (Cohen et al. 2019).

    Departures: a copy's cells are counted, not cut at a percentile, and ties at the cut are all left out.

    Args:
        base: any interpreter of images; it must explain ``model``.
        seed: of the noise, which is the same for every input.
    """

    def _marks(self, x: Tensor, target: Tensor | None, graph: bool) -> Tensor:
        """``[samples, b, h, w]``: 1 where a copy's map is among its largest."""
        found = copy_maps(self, x, target, graph, self.sigma)
        return torch.cat([marked(cells(maps, x.shape[-2:], self.grid), self.keep, graph) for maps in found])

    def _shares(self, marks: Tensor) -> Tensor:
        return marks.mean(0)

    def _certificate(self, marks: Tensor) -> Certificate:
        chosen, tests = marks[: self.choose], self.samples - self.choose
        important = chosen.sum(0, dtype=torch.float64) > self.choose / 2
        hits = marks[self.choose :].sum(0, dtype=torch.float64).round().long()
        agree = torch.where(important, hits, tests - hits)
        p = tails(tests, self.tau).to(marks.device)[agree]
        proved = rejected(p.flatten(1), self.alpha, self.correction).reshape(important.shape)
        decided = torch.where(proved, important.to(torch.int8), ABSTAIN).to(torch.int8)
        return Certificate(self.radius, self.alpha, marks.mean(0, dtype=torch.float32), decided)
