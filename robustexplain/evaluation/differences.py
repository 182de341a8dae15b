"""Differences of two measures of the same samples: intervals, p-values, and their correction for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..errors import InputError
from ..random_streams import derive
from .statistics import UNBOUNDED, Estimate, Z, bootstrap, defined, drawn_means, ends, measured, over_seeds, share

EXACT = 16
"""Up to so many samples that differ, a sign-flip test goes through all flips."""


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference, its 95% interval, and the p-value of a test that there is none.

    ``p`` is two-sided; ``None`` where there is no sample.
    """

    p: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """As plain data."""
        return {**super().as_dict(), "p": self.p}


def paired(values: Tensor, reference: Tensor, resamples: int = 2000, seed: int = 0) -> Difference:
    """The mean difference of two measures of the same samples, with its interval and p-value.

    The interval is by bootstrap over samples, the p-value that of :func:`sign_flips`. NaN in either leaves a sample
    out.
    """
    found = bootstrap(values.double() - reference.double(), resamples, seed)
    p = sign_flips(values.double() - reference.double(), seed=seed)
    return Difference(found.value, found.low, found.high, found.count, p)


def difference(values: Tensor, reference: Tensor, binary: bool, resamples: int = 2000, seed: int = 0) -> Difference:
    """:func:`paired_shares` where a measure is ``binary`` and no value lies between 0 and 1, else :func:`paired`."""
    both = torch.stack([values.double(), reference.double()])
    exact = binary and bool((both.isnan() | (both == 0) | (both == 1)).all())
    return paired_shares(values, reference) if exact else paired(values, reference, resamples, seed)


def over_seeds_difference(
    values: Tensor,
    resamples: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = UNBOUNDED,
    binary: bool = False,
) -> Difference:
    """The mean of paired differences ``[S, N]`` over seeds and samples, its two-stage interval and p-value.

    The p-value inverts that bootstrap: twice the share of drawn means on the other side of zero (Efron and Tibshirani
    1993, section 15.4), the seen mean counted among them. ``bounds`` are those of the measure itself, of which two
    values differ by the width between them at most. Of ``binary`` measures the interval is never narrower than Tango's
    of one seed with the mean counts: where no sample differs under any seed, it is no point.
    """
    width = bounds[1] - bounds[0]
    found, array = over_seeds(values, resamples, seed, (-width, width)), measured(values)
    if found.value is None:
        return Difference(None, None, None, 0, None)
    if binary:
        found = _at_least_tangos(found, array)
    if not np.nan_to_num(array).any():
        return Difference(found.value, found.low, found.high, found.count, 1.0)
    drawn = drawn_means(array, resamples, seed)
    return Difference(found.value, found.low, found.high, found.count, inverted(drawn))


def _at_least_tangos(found: Estimate, array: np.ndarray) -> Estimate:
    n = int((~np.isnan(array)).sum(1).max())
    more, fewer = (float((side > 0).sum(1).mean()) for side in (array, -array))
    low, high = tango(more, fewer, n)
    return Estimate(found.value, min(low, found.low or 0.0), max(high, found.high or 0.0), found.count)


def inverted(drawn: np.ndarray) -> float:
    """The two-sided p-value that inverts a bootstrap's drawn differences (Efron and Tibshirani 1993, section 15.4)."""
    other = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (1 + other) / (1 + len(drawn)))


def paired_shares(values: Tensor, reference: Tensor) -> Difference:
    """The difference of two shares of the same samples, with Tango's interval and McNemar's exact p-value.

    The interval holds the differences that the score test does not reject (Tango 1998, equations 3 to 7); it is defined
    by the samples that are 1 in one measure alone, and does not shrink to a point where there are none: then it is
    ``z^2 / (n + z^2)`` wide to either side.

    Args:
        values: ``[N]`` of 0 and 1; NaN in either leaves a sample out.
        reference: ``[N]``.

    Raises:
        InputError: a value that is neither 0 nor 1.
    """
    known = ~(values.isnan() | reference.isnan())
    mine, other = values[known], reference[known]
    for part in (mine, other):
        share(part)
    n = len(mine)
    if not n:
        return Difference(None, None, None, 0, None)
    more, fewer = int(((mine > 0) & (other == 0)).sum()), int(((mine == 0) & (other > 0)).sum())
    low, high = tango(more, fewer, n)
    return Difference((more - fewer) / n, low, high, n, mcnemar(more, fewer))


def tango(more: float, fewer: float, n: int) -> tuple[float, float]:
    """The 95% score interval of a difference of paired shares (Tango 1998).

    Args:
        more: samples that are 1 in the first measure alone; a mean over seeds need not be whole.
        fewer: samples that are 1 in the second alone.
        n: all samples.
    """

    def excess(delta: float) -> float:
        # The likeliest share of `fewer` among tables whose difference is delta (equation 6).
        b = -more - fewer + (2 * n - more + fewer) * delta
        c = -fewer * delta * (1 - delta)
        likeliest: float = (max(b * b - 8 * n * c, 0) ** 0.5 - b) / (4 * n)
        return float(more - fewer - n * delta) ** 2 - Z**2 * n * (2 * likeliest + delta * (1 - delta))

    return ends(excess, (more - fewer) / n, -1.0, 1.0)


def mcnemar(more: int, fewer: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947): of the samples that differ, half would be on each side."""
    return 1.0 if more + fewer == 0 else float(scipy.stats.binomtest(more, more + fewer).pvalue)


def sign_flips(differences: Tensor, resamples: int = 9999, seed: int = 0) -> float | None:
    """The two-sided p-value of the sign-flip permutation test of a mean paired difference (Fisher 1935, section 21).

    Without a difference between the measures, each sample's is as likely to have the other sign. With few samples all
    flips are counted; else random ones, and the flip that was seen (Phipson and Smyth 2010): ``(1 + more) / (1 +
    resamples)``. ``None`` where there is no sample.

    Args:
        differences: ``[N]``; NaN leaves a sample out.
        resamples: random flips.
        seed: of the flips.
    """
    array = defined(differences)
    if not len(array):
        return None
    array = array[array != 0]
    if not len(array):
        return 1.0
    # Sums that differ by rounding alone are equal.
    seen = abs(array.sum()) * (1 - 1e-12)
    if len(array) <= EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(array))[:, None] >> np.arange(len(array))) & 1)
        return float((np.abs(signs @ array) >= seen).mean())
    random, above = np.random.default_rng(derive(seed, "flips", len(array))), 0
    block = max(1, int(4e6) // len(array))
    for start in range(0, resamples, block):
        signs = random.integers(2, size=(min(block, resamples - start), len(array)), dtype=np.int8) * 2 - 1
        above += int((np.abs(signs @ array) >= seen).sum())
    return (1 + above) / (1 + resamples)


def holm(p_values: Sequence[float], unseen: int = 0) -> list[float]:
    """P-values corrected for their number by Holm's step-down procedure (Holm 1979), in the given order.

    To call those below 0.05 different makes a wrong call in at most 5% of the families of comparisons. So it does if
    ``unseen`` more comparisons belong to the family, whose p-values are not known: they are taken for the largest.

    Raises:
        InputError: a p-value that is not in ``[0, 1]``.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise InputError(f"a p-value lies in [0, 1], got {p!r}")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) + unseen - rank) * p_values[i]))
        corrected[i] = highest
    return corrected
