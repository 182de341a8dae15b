"""Shares, means and areas under ROC curves with 95% intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import InputError
from ..metrics import auc
from ..random_streams import derive

Z = float(scipy.stats.norm.ppf(0.975))
"""The normal quantile of a two-sided 95% interval."""
NEAR = 1e-7
"""The share of the way from an estimate to a bound at which the search for an interval's end begins."""


@dataclass(frozen=True)
class Estimate:
    """A share or a mean over ``count`` samples and the ends of its 95% interval; ``None`` where there is no sample."""

    value: float | None
    low: float | None
    high: float | None
    count: int

    def as_dict(self) -> dict[str, float | int | None]:
        """As plain data."""
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


UNBOUNDED = (-float("inf"), float("inf"))
"""The bounds of a measure that has none."""
UNIT = (0.0, 1.0)
"""The bounds of a share."""
NOTHING = Estimate(None, None, None, 0)
"""The estimate of no samples."""


def share(values: Tensor) -> Estimate:
    """The share of ones among ``values`` ``[N]`` of 0 and 1, and its exact interval (Clopper and Pearson 1934).

    It covers at least 95% whatever the share is, and does not shrink to a point where all samples agree: none of 8 has
    the interval ``[0, 0.369]``. NaN marks a sample on which the measure is undefined: it is left out and not counted.

    Raises:
        InputError: a value that is neither 0 nor 1.
    """
    array = defined(values)
    _refuse_others(array)
    if not len(array):
        return NOTHING
    hits = int(array.sum())
    interval = scipy.stats.binomtest(hits, len(array)).proportion_ci(0.95, method="exact")
    return Estimate(hits / len(array), float(interval.low), float(interval.high), len(array))


def share_of_draws(values: Tensor, inputs: int) -> Estimate:
    """:func:`share` of several draws for each of so many ``inputs``: the interval is that of the inputs alone.

    Draws of one input are alike, in the worst case equal. (Clopper and Pearson's ends as quantiles of beta
    distributions, which fractions of hits have too.)
    """
    found = share(values)
    if found.value is None or found.count <= inputs:
        return found
    return Estimate(found.value, *_exact(found.value, inputs), inputs)


def bootstrap(values: Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of ``values`` ``[N]`` and its 95% percentile interval over resampled samples.

    NaN marks a sample on which the measure is undefined: it is left out and not counted.
    """
    array = defined(values)
    if not len(array):
        return NOTHING
    low, high = np.quantile(resampled_means(array, resamples, seed), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), len(array))


def estimate(values: Tensor, binary: bool, resamples: int = 2000, seed: int = 0) -> Estimate:
    """:func:`share` where a measure is ``binary`` and no value lies between 0 and 1, else :func:`bootstrap`."""
    values = values.double()
    exact = binary and bool((values.isnan() | (values == 0) | (values == 1)).all())
    return share(values) if exact else bootstrap(values, resamples, seed)


def over_seeds(
    values: Tensor, resamples: int = 2000, seed: int = 0, bounds: tuple[float, float] = UNBOUNDED
) -> Estimate:
    """The mean of ``values`` ``[S, N]`` over seeds and samples, with a two-stage interval that covers both.

    Seeds and samples are drawn with replacement, each on its own, the same samples for all drawn seeds (Owen 2007, the
    pigeonhole bootstrap: seeds and samples are crossed). Of few seeds a bootstrap is too narrow for two reasons: it has
    the sample's spread (factor ``sqrt(S / (S - 1))``), and does not know that the spread itself is uncertain (Student's
    quantile over the normal one). Departure: each drawn seed's distance to the mean is stretched by both, 2.7 times for
    three seeds. With one seed it is the interval over samples alone.

    The stretch moves drawn means beyond what a measure can be: a share of two seeds would begin below 0. The ends are
    cut at the measure's bounds. That loses no coverage, as the mean lies between them whatever was drawn, and it leaves
    the ends alone that lie inside, which a transformed scale would move, and where all samples sit at a bound it is
    not undefined, as a logarithm is.

    Args:
        values: a row a seed, a column a sample; NaN where a seed does not measure a sample.
        resamples: how many.
        seed: of the draws.
        bounds: the smallest and the largest value that a sample can have.
    """
    array = measured(values)
    if not array.size:
        return NOTHING
    low, high = np.quantile(drawn_means(array, resamples, seed), [0.025, 0.975])
    mean = float(np.nanmean(array, 1).mean())
    return Estimate(mean, max(bounds[0], float(low)), min(bounds[1], float(high)), array.shape[1])


def shares_over_seeds(values: Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """:func:`over_seeds` of 0 and 1, never narrower than the exact interval of one seed with the mean share.

    So none of 8 under any of three seeds has the interval ``[0, 0.369]``, and not a point. (Clopper and Pearson's ends
    as quantiles of beta distributions, which fractions of hits have too.)
    """
    found = over_seeds(values, resamples, seed, UNIT)
    if found.value is None or found.low is None or found.high is None:
        return found
    low, high = _exact(found.value, int((~values.isnan()).sum(1).max()))
    return Estimate(found.value, min(low, found.low), max(high, found.high), found.count)


def of_estimates(estimates: Sequence[Estimate], least: float = 0.0, most: float = 1.0) -> Estimate:
    """The mean of each seed's estimate of a figure that is no mean over samples, such as an area under a ROC curve.

    The half-widths to either side are the root of the sum of two squares: the mean half-width over samples, and
    Student's interval of the seeds' mean.
    """
    known = [(e.value, e.low or 0.0, e.high or 0.0, e.count) for e in estimates if e.value is not None]
    if not known:
        return NOTHING
    values = np.array([value for value, *_ in known])
    sides = np.mean([(value - low, high - value) for value, low, high, _ in known], 0)
    among = 0.0
    if len(values) > 1:
        among = float(scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    below, above = (float((side**2 + among**2) ** 0.5) for side in sides)
    mean, count = float(values.mean()), min(count for *_, count in known)
    return Estimate(mean, max(least, mean - below), min(most, mean + above), count)


def measured(values: Tensor) -> np.ndarray:
    """``values`` ``[S, N]`` without seeds and samples that measure nothing, as float64."""
    array: np.ndarray = values.detach().double().cpu().numpy()
    array = array[~np.isnan(array).all(1)] if array.size else array
    return array[:, ~np.isnan(array).all(0)] if array.size else array


def drawn_means(array: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The means of ``array`` ``[S, N]`` over drawn seeds and samples that :func:`over_seeds` describes."""
    means = np.nanmean(array, 1)
    effects = (means - means.mean()) * _stretch(len(array))
    rest = array - means[:, None]
    random = np.random.default_rng(derive(seed, "seeds", *array.shape))
    block, drawn = max(1, int(2e6) // array.size), []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        seeds = random.integers(len(array), size=(size, len(array)))
        samples = random.integers(array.shape[1], size=(size, array.shape[1]))
        some = rest[seeds[:, :, None], samples[:, None]]
        counts = (~np.isnan(some)).sum(2)
        moved = np.where(counts > 0, np.nansum(some, 2) / np.maximum(counts, 1), 0.0)
        drawn.append(means.mean() + (effects[seeds] + moved).mean(1))
    return np.concatenate(drawn)


def separation(harmless: Tensor, attacked: Tensor, inputs: int | None = None) -> Estimate:
    """The area under the ROC curve of two batches of numbers, with an interval that does not shrink to a point at 1.

    The chance that one of ``attacked`` is above one of ``harmless``, ties counted half. The interval is that of
    Newcombe (2006, part 2, method 5): the areas ``a`` with ``|a - estimate| <= z sqrt(V(a))``, ``V`` Hanley and
    McNeil's (1982) variance with ``(m + n) / 2 - 1`` in place of both sample sizes less one.

    Args:
        harmless: ``[M]``.
        attacked: ``[N]``.
        inputs: how many independent inputs ``harmless`` is from, where several are of one input.

    Raises:
        InputError: no numbers of either kind, or NaN among them.
    """
    estimate, m, n = auc(harmless, attacked), min(inputs or len(harmless), len(harmless)), len(attacked)
    half = (m + n) / 2 - 1

    def excess(area: float) -> float:
        variance = area * (1 - area) * (1 + half * ((1 - area) / (2 - area) + area / (1 + area))) / (m * n)
        return (area - estimate) ** 2 - Z**2 * variance

    return Estimate(estimate, *ends(excess, estimate, 0.0, 1.0), n)


def defined(values: Tensor) -> np.ndarray:
    """The values that are not NaN, as float64."""
    array: np.ndarray = values.detach().double().cpu().numpy()
    known: np.ndarray = array[~np.isnan(array)]
    return known


def resampled_means(array: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of ``array`` over samples drawn with replacement, ``[resamples]``."""
    random = np.random.default_rng(derive(seed, "bootstrap", len(array)))
    # In blocks: all resamples at once would need resamples x N memory.
    block = max(1, int(4e6) // len(array))
    parts = []
    for start in range(0, resamples, block):
        rows = random.integers(len(array), size=(min(block, resamples - start), len(array)))
        parts.append(array[rows].mean(1))
    return np.concatenate(parts)


def _exact(value: float, n: int) -> tuple[float, float]:
    """Clopper and Pearson's ends for a share of ``n``, which need not be whole hits."""
    hits = value * n
    low = 0.0 if hits <= 0 else float(scipy.stats.beta.ppf(0.025, hits, n - hits + 1))
    return low, 1.0 if hits >= n else float(scipy.stats.beta.ppf(0.975, hits + 1, n - hits))


def _refuse_others(array: np.ndarray) -> None:
    other = array[(array != 0) & (array != 1)]
    if len(other):
        raise InputError(f"a share is of samples that are 0 or 1, got {float(other[0])!r}")


def _stretch(seeds: int) -> float:
    """By how much the bootstrap of so few seeds is too narrow."""
    if seeds < 2:
        return 0.0
    return float((seeds / (seeds - 1)) ** 0.5 * scipy.stats.t.ppf(0.975, seeds - 1) / Z)


def ends(excess: Callable[[float], float], estimate: float, least: float, most: float) -> tuple[float, float]:
    """Where ``excess``, which is below zero around the estimate, crosses zero on either side; else the bounds."""
    found = []
    for bound in (least, most):
        # At its bound, and where all samples agree, an estimate is a zero itself, but not the one that is sought.
        near = estimate + NEAR * (bound - estimate)
        if near == bound or excess(bound) <= 0 or excess(near) >= 0:
            found.append(bound)
        else:
            found.append(float(scipy.optimize.brentq(excess, *sorted((near, bound)), xtol=1e-10)))
    return found[0], found[1]
