"""Intervals cover what they promise and never shrink to a point, tests are exact, and corrections are Holm's."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.evaluation import RunFolder, bootstrap, holm, over_seeds, paired, paired_shares, separation, share
from robustexplain.evaluation.differences import difference, mcnemar, over_seeds_difference, sign_flips, tango
from robustexplain.evaluation.origins import Origins
from robustexplain.evaluation.statistics import Z, estimate, shares_over_seeds
from robustexplain.evaluation.summaries import Summaries
from robustexplain.metrics import L1, SSIM, Spearman

from .made_up import results_of, row


def ones(hits: int, n: int) -> Tensor:
    return torch.cat([torch.ones(hits), torch.zeros(n - hits)])


# ---- shares ----


@pytest.mark.parametrize(
    "hits,n,low,high",
    [(0, 8, 0, 0.3694), (0, 100, 0, 0.0362), (8, 8, 0.6306, 1), (7, 10, 0.3475, 0.9333)],
)
def test_shares_have_exact_intervals(hits: int, n: int, low: float, high: float) -> None:
    found = share(ones(hits, n))
    assert (found.value, found.count) == (hits / n, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    # The ends are the shares under which so few, or so many, are 2.5% likely.
    if 0 < hits < n:
        assert found.low is not None
        assert found.high is not None
        assert scipy.stats.binom.sf(hits - 1, n, found.low) == pytest.approx(0.025)
        assert scipy.stats.binom.cdf(hits, n, found.high) == pytest.approx(0.025)


def test_samples_without_a_measure_are_left_out_of_shares_and_other_values_are_refused() -> None:
    nan = float("nan")
    assert share(torch.tensor([1.0, nan, 0.0, nan])) == share(torch.tensor([1.0, 0.0]))
    assert share(torch.tensor([nan])).value is None
    with pytest.raises(InputError, match=r"0 or 1, got 0\.5"):
        share(torch.tensor([0.5]))
    halves = torch.tensor([0.5, 1.0, 0.0])
    assert estimate(halves, binary=True) == bootstrap(halves)  # a tie is no share
    assert estimate(halves.round(), binary=True) == share(halves.round())
    assert estimate(halves.round(), binary=False) == bootstrap(halves.round())


# ---- paired differences ----


def quartic(n: int, b: int, c: int) -> tuple[float, float]:
    """Tango's interval without a search: the roots of Yang, Sun and Hardin's (2013) quartic."""
    g = Z**2
    roots = np.roots(
        [
            n**2 * (n / g + 1) ** 2,
            -n * (b - c) * (n / g + 1) * (4 * n / g + 1),
            2 * n * (b - c) ** 2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
            n * (b - c) * (2 * (b + c) / g + 1) - (b - c) ** 3 * (4 * n / g + 1) / g,
            (b - c) ** 2 * ((b - c) ** 2 / g - (b + c)) / g,
        ]
    )
    real = sorted(float(root.real) for root in roots if abs(root.imag) < 1e-7)
    return real[0], real[-1]


@pytest.mark.parametrize("n,b,c", [(160, 40, 20), (21, 1, 7), (50, 12, 2), (100, 3, 0), (44, 0, 1), (30, 5, 5)])
def test_the_interval_of_a_difference_of_shares_is_tangos(n: int, b: int, c: int) -> None:
    assert tango(b, c, n) == pytest.approx(quartic(n, b, c), abs=1e-6)


def test_where_no_sample_differs_the_difference_still_has_an_interval() -> None:
    same = paired_shares(ones(30, 100), ones(30, 100))
    assert (same.value, same.p, same.count) == (0, 1, 100)
    assert same.high == pytest.approx(Z**2 / (100 + Z**2))
    assert same.low == pytest.approx(-(Z**2) / (100 + Z**2))
    all_differ = paired_shares(torch.ones(20), torch.zeros(20))
    assert all_differ.high == 1
    assert all_differ.low is not None
    assert 0.6 < all_differ.low < 0.9
    nan = torch.tensor([1.0, float("nan"), 0.0])
    assert paired_shares(nan, torch.tensor([0.0, 1.0, 0.0])).count == 2
    assert paired_shares(nan[1:2], nan[:1]).p is None


def test_intervals_of_differences_cover_what_they_promise() -> None:
    """All tables of 25 samples, under several truths: 95% on average, and hardly less anywhere."""
    n, coverage = 25, []
    known = {(b, c): tango(b, c, n) for b, c in product(range(n + 1), repeat=2) if b + c <= n}
    for p_b, p_c in [(0.0, 0.0), (0.02, 0.02), (0.1, 0.0), (0.1, 0.1), (0.3, 0.05), (0.2, 0.2), (0.5, 0.1), (0.8, 0.1)]:
        tables = scipy.stats.multinomial(n, [p_b, p_c, 1 - p_b - p_c])
        inside = [(b, c) for (b, c), (low, high) in known.items() if low - 1e-9 <= p_b - p_c <= high + 1e-9]
        coverage.append(sum(tables.pmf([b, c, n - b - c]) for b, c in inside))
    print([f"{value:.3f}" for value in coverage])
    assert min(coverage) > 0.92
    assert sum(coverage) / len(coverage) > 0.95


def test_mcnemars_p_value_is_that_of_a_fair_coin_on_the_samples_that_differ() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(8, 1) == mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    found = paired_shares(ones(9, 20), ones(1, 20).flip(0))
    assert found.p == mcnemar(9, 1)


def test_sign_flips_count_all_flips_of_few_samples_and_draw_those_of_many() -> None:
    few = torch.tensor([0.3, 1.0, -0.2, 2.0, 0.7, 0.0])
    sums = [abs(sum(s * v for s, v in zip(signs, few.tolist(), strict=True))) for signs in product((1, -1), repeat=6)]
    assert sign_flips(few) == pytest.approx(sum(s >= abs(float(few.sum())) - 1e-6 for s in sums) / len(sums))
    assert sign_flips(torch.zeros(5)) == 1
    assert sign_flips(torch.full((3,), float("nan"))) is None
    many = torch.randn(60, generator=torch.Generator().manual_seed(0)) + 0.2
    theirs = scipy.stats.permutation_test(
        (many.numpy(),), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    ).pvalue
    assert sign_flips(many) == pytest.approx(theirs, abs=0.02)
    assert sign_flips(many) == sign_flips(many)


def test_a_difference_of_means_has_the_bootstraps_interval_and_the_flips_p_value() -> None:
    a, b = torch.rand(2, 40, generator=torch.Generator().manual_seed(1))
    found = difference(a, b, binary=True)  # not of 0 and 1 after all
    assert found == paired(a, b)
    plain = bootstrap(a.double() - b.double())
    assert (found.value, found.low, found.high) == (plain.value, plain.low, plain.high)
    assert found.p == sign_flips(a.double() - b.double())
    assert difference(a.round(), b.round(), binary=True) == paired_shares(a.round(), b.round())
    assert found.as_dict().keys() == {"value", "low", "high", "count", "p"}


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(InputError, match="nan"):
        holm([0.1, math.nan])
    # The chance of any wrong call among ten true null hypotheses stays at 5%.
    p = np.random.default_rng(0).uniform(size=(4000, 10))
    wrong = np.mean([min(holm(list(row))) < 0.05 for row in p])
    assert scipy.stats.binomtest(int(wrong * 4000), 4000, 0.05).pvalue > 1e-3


# ---- areas under ROC curves ----


def test_an_area_of_one_has_an_interval() -> None:
    found = separation(torch.zeros(100), torch.ones(50))
    assert (found.value, found.high, found.count) == (1, 1, 50)
    assert found.low is not None
    assert 0.9 < found.low < 0.99
    mirrored = separation(torch.ones(50), torch.zeros(100))
    assert (mirrored.value, mirrored.low) == (0, 0)
    assert mirrored.high == pytest.approx(1 - found.low)
    few = separation(torch.zeros(100), torch.ones(50), inputs=5)  # a hundred draws of five inputs
    assert few.low is not None
    assert few.low < found.low - 0.05
    with pytest.raises(InputError, match="both kinds"):
        separation(torch.zeros(0), torch.ones(3))


@pytest.mark.parametrize("shift,m,n", [(0.0, 30, 20), (1.0, 60, 30), (2.5, 30, 30), (4.0, 50, 20)])
def test_intervals_of_areas_cover_what_they_promise(shift: float, m: int, n: int) -> None:
    random, area, inside = np.random.default_rng(7), float(scipy.stats.norm.cdf(shift / 2**0.5)), 0
    for _ in range(300):
        harmless, attacked = random.normal(size=m), random.normal(shift, size=n)
        found = separation(torch.from_numpy(harmless), torch.from_numpy(attacked))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= area <= found.high
    print(f"{inside / 300:.3f}")
    assert inside / 300 > 0.92


# ---- seeds ----


@pytest.mark.parametrize("between,seeds", [(0.0, 3), (0.3, 3), (0.3, 8)])
def test_intervals_over_seeds_and_samples_cover_both(between: float, seeds: int) -> None:
    random, inside, narrow = np.random.default_rng(3), 0, 0
    for _ in range(150):
        values = random.normal(size=(seeds, 1)) * between + random.normal(size=60) + random.normal(size=(seeds, 60))
        found = over_seeds(torch.from_numpy(values), resamples=300)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0 <= found.high
        plain = bootstrap(torch.from_numpy(values.mean(0)), resamples=300)
        assert plain.low is not None
        assert plain.high is not None
        narrow += plain.low <= 0 <= plain.high
    print(f"{inside / 150:.3f}, over images alone {narrow / 150:.3f}")
    assert inside / 150 > 0.9
    if between:
        assert narrow < inside


def test_one_seed_has_the_interval_over_samples_alone_and_what_a_seed_does_not_judge_is_left_out() -> None:
    values = torch.rand(1, 200, generator=torch.Generator().manual_seed(0))
    alone, plain = over_seeds(values, 4000), bootstrap(values[0], 4000)
    assert (alone.value, alone.count) == (pytest.approx(plain.value), 200)
    assert (alone.low, alone.high) == (pytest.approx(plain.low, abs=5e-3), pytest.approx(plain.high, abs=5e-3))
    nan = float("nan")
    some = over_seeds(torch.tensor([[1.0, nan, 1.0], [nan, nan, 0.0], [nan, nan, nan]]))
    assert (some.value, some.count) == (0.5, 2)
    assert over_seeds(torch.full((2, 3), nan)).value is None


def test_intervals_over_few_seeds_stay_within_what_the_measure_can_be() -> None:
    rng = torch.Generator().manual_seed(0)
    hits = (torch.rand(2, 40, generator=rng) < torch.tensor([[0.05], [0.3]])).double()
    free, cut = over_seeds(hits), over_seeds(hits, bounds=(0, 1))
    assert free.low is not None
    assert free.low < 0
    assert (cut.value, cut.low, cut.high) == (free.value, 0, min(free.high or 0, 1))
    found = shares_over_seeds(hits)
    assert found.low == 0
    assert found.high is not None
    assert found.high <= 1
    distances = over_seeds(torch.rand(2, 40, generator=rng) * torch.tensor([[0.01], [0.2]]), bounds=(0, math.inf))
    assert distances.low == 0
    apart = over_seeds_difference(torch.tensor([[1.0] * 9, [-0.5] * 9]), bounds=(0, 1))
    assert (apart.low, apart.high) == (-1, 1)
    same = over_seeds_difference(torch.zeros(3, 20), bounds=(0, 1), binary=True)
    assert (same.low, same.high, same.p) == (*tango(0, 0, 20), 1)
    inside = torch.rand(3, 200, generator=rng)
    assert over_seeds(inside, bounds=(0, 1)) == over_seeds(inside)  # what lies inside is left alone


def test_bounds_of_a_cell_s_measures_are_its_metrics_own(tmp_path: Path) -> None:
    experiment = results_of([row("plain")], [], {}).experiment
    experiment = replace(experiment, metrics={"l1": L1(), "ssim": SSIM(), "spearman": Spearman()})
    bounds = Summaries(experiment, RunFolder(tmp_path), Origins(experiment)).bounds
    inf = math.inf
    expected = {
        **dict.fromkeys(("joint", "joint_mean", "confidence", "l1_nearer", "alarm"), (0, 1)),
        **dict.fromkeys(("certified_one", "certified_zero", "certified_overlap", "contradicted"), (0, 1)),
        **dict.fromkeys(("perturbation", "certified_radius"), (0, math.inf)),
        **{"l1": L1.bounds, "l1_goal": L1.bounds, "distance": L1.bounds, "spearman_honest": (-1, 1)},
        **{"queries": (0, inf), "score": (-inf, inf)},
    }
    assert {name: bounds(name) for name in expected} == expected
    assert L1.bounds[0] == 0
