"""MeTFA: order statistics and tests over the maps of noisy copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ... import maps as ops
from ...errors import InputError
from ...fields import Count, Eps
from ...registry import INTERPRETERS
from ..base import Explanation
from ..certificate import ABSTAIN, Certificate
from ..gradients.integrated import predicted
from ..gradients.smoothgrad import uniform
from .base import in_rows
from .binomial import draws_needed, tails
from .certified import Inner
from .noisy_copies import ProvingCopies, above, attached, copy_maps, followed

Shown = Literal["smoothed", "significance", "interval"]
"""Which of MeTFA's maps is shown."""


@dataclass(frozen=True)
class MeTFASettings:
    """How maps of noisy copies become one (Gan et al. 2022).

    Args:
        samples: noisy copies (the authors' code: 10, of which 2 are left out by a smoothed map; at least 6 at 0.05).
        noise: copies differ from the input by uniform noise of at most this, and are clipped to ``[0, 1]``.
        shown: ``smoothed``, the mean of what lies between two order statistics; ``interval``, the distance of these
            two, an uncertainty of each pixel; or ``significance``: 1 where a pixel is above the cut in significantly
            more than half of the copies, 0 where in significantly fewer, else 1/2.
        alpha: of the interval and of each pixel's test; over all pixels together nothing is corrected.
        batch_size: largest number of copies in one pass of the model.

    Raises:
        InputError: too few draws for ``alpha``.
    """

    samples: Count = 20
    noise: Eps = 0.1
    shown: Shown = "smoothed"
    alpha: Inner = 0.05
    batch_size: Count = 64

    @property
    def lowest(self) -> int:
        """``k1``: the interval is from the order statistic ``k1``, counted from 0, to ``samples - k1 - 1``."""
        # P(X <= m) = P(X >= n - m) at probability 1/2.
        below = tails(self.samples, 0.5).flip(0)
        return int((below < self.alpha / 2).sum()) - 1

    def check_draws(self, size: tuple[int, ...] | None = None) -> None:
        """Refuse so few draws that no interval has the confidence asked for, and noise of 0."""
        name = type(self).__name__
        if self.noise == 0:
            raise InputError(f"{name}.noise: must be above 0, or all copies are alike, got {self.noise}")
        if self.lowest < 0:
            needed = draws_needed(0.5, self.alpha / 2)
            needed += 0.5**needed >= self.alpha / 2
            raise InputError(f"{name}: {self.samples} draws give no interval at alpha {self.alpha}: at least {needed}")


@INTERPRETERS.register("metfa", paper="Gan et al. 2022")
@dataclass(frozen=True, eq=False)
class MeTFA(MeTFASettings, ProvingCopies):
    """MeTFA: a trimmed mean of the min-max scaled maps of noisy copies, with each pixel's significance.

    What is proved is about the noise alone: the certificate's radius is 0, and no adversary is excluded by it.

    Departure: the cut between important and other pixels is the best of two classes (Jenks, which for two is Otsu's)
    for each copy, of all its pixels; the authors' code takes one cut from 1000 pixels of all copies, which makes the
    copies depend on each other.

    Args:
        base: any interpreter of images; it must explain ``model``.
        seed: of the noise, which is the same for every input.
    """

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        """Whether tests stand between the copies' maps and the one shown."""
        return self.shown == "significance" or self.base.rounds

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = x if graph else x.detach()
        logits, target = predicted(self.model, x, target, graph)
        follow = followed(graph) if self.rounds else graph
        scaled = torch.cat([self._scaled(*rows, follow) for rows in in_rows(x, target, self.batch_size)], 1)
        votes = above(*self._rows(scaled), follow and self.shown == "significance").reshape(scaled.shape)
        certificate = self._certificate(votes.detach())
        maps = attached(self._map(scaled, votes, certificate), logits)
        return Explanation(logits, maps, certificate=certificate)

    def _scaled(self, x: Tensor, target: Tensor | None, graph: bool) -> Tensor:
        found = copy_maps(self, x, target, graph, self.noise, uniform, clip=True)
        return torch.cat([ops.minmax(maps.flatten(0, 1)).reshape(maps.shape) for maps in found])

    @staticmethod
    def _rows(scaled: Tensor) -> tuple[Tensor, Tensor]:
        rows = scaled.flatten(0, 1).flatten(1)
        return rows, two_classes(rows.detach())

    def _map(self, scaled: Tensor, votes: Tensor, certificate: Certificate) -> Tensor:
        if self.shown == "significance":
            assert certificate.decided is not None  # always tested; for the type checker
            share = votes.mean(0)
            value = torch.where(certificate.decided == ABSTAIN, 0.5, certificate.decided.to(share.dtype))
            return value.detach() + (share - share.detach())
        ordered, k = scaled.sort(0).values, self.lowest
        if self.shown == "interval":
            return ordered[self.samples - k - 1] - ordered[k]
        return ordered[k : self.samples - k].mean(0)

    def _certificate(self, votes: Tensor) -> Certificate:
        above_half = votes.sum(0, dtype=torch.float32).round().long()
        p = tails(self.samples, 0.5).to(votes.device)
        important, other = p[above_half] < self.alpha, p[self.samples - above_half] < self.alpha
        decided = (important.to(torch.int8) - (~important & ~other).to(torch.int8)).to(torch.int8)
        scores = votes.mean(0, dtype=torch.float32)
        return Certificate(0.0, self.alpha, scores, decided, each_pixel=True)


def two_classes(rows: Tensor) -> Tensor:
    """The largest value of the lower of two classes of each row ``[m, n]``, ``[m, 1]``: natural breaks (Jenks).

    The squares between the classes, ``k (n - k) (difference of their means)^2``, are largest.
    """
    ordered = ops.ascending(rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows)
    n = ordered.shape[1]
    if n == 1:
        return rows
    sums, k = ordered.double().cumsum(1), torch.arange(1, n, device=rows.device, dtype=torch.float64)
    lower, whole = sums[:, :-1], sums[:, -1:]
    between = k * (n - k) * (lower / k - (whole - lower) / (n - k)).square()
    return ordered.gather(1, between.argmax(1, keepdim=True)).to(rows.dtype)
