"""Ranks counted exactly: orders, inversions, ties and shared top pixels against scipy and slow loops."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.metrics import Cosine, Kendall, Pearson, Spearman, TopK, ranking
from robustexplain.metrics.ranking import inversions, kendall_tau, spearman, stable_order, top_k_shared

stats = pytest.importorskip("scipy.stats")

Pairs = tuple[Tensor, Tensor]


def drawn(rows: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def permutations(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n, dtype=np.int32), (rows, 1)), axis=1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def mixed(request: pytest.FixtureRequest) -> Pairs:
    """Rows without ties, with few, with many in one or both, of one value but for one, of -0 and 0."""
    a, b = drawn(8, 77), drawn(8, 77, seed=1)
    b += a
    a[1, 5], b[2, 7] = a[1, 60], b[2, 3]
    a[3], b[4] = a[3].round(), (3 * b[4]).round()
    a[5], b[5] = a[5].relu(), b[5].relu()
    a[6] = 0.5
    a[6, 9] = 1e-30
    a[7] = torch.where(a[7] > 0, 0.0, -0.0)
    a[7, 70:] = -1e-42
    return a.to(request.param), b.to(request.param)


# Order


def test_a_stable_order_keeps_equal_values_in_reading_order_either_way(mixed: Pairs) -> None:
    for rows in mixed:
        wanted = np.argsort(rows.numpy(), axis=1, kind="stable")
        assert np.array_equal(stable_order(rows), wanted)
        assert torch.equal(stable_order(rows, descending=True), rows.argsort(dim=1, stable=True, descending=True))


def test_orders_of_rows_that_do_not_lie_next_to_each_other(mixed: Pairs) -> None:
    for rows in mixed:
        spread = torch.stack([rows, rows.flip(1)], 2)
        assert torch.equal(stable_order(spread[..., 0]), stable_order(rows))
        assert torch.equal(stable_order(rows.T.contiguous().T), stable_order(rows))
        assert torch.equal(spearman(spread[..., 0], spread[..., 1]), spearman(rows, rows.flip(1)))
        assert torch.equal(kendall_tau(spread[..., 0], spread[..., 1]), kendall_tau(rows, rows.flip(1)))


def test_ranks_against_scipy_with_and_without_ties(mixed: Pairs) -> None:
    for rows in mixed:
        found = ranking.ranks(rows)
        assert found.dtype == rows.dtype
        np.testing.assert_array_equal(found, stats.rankdata(rows.numpy(), axis=1))


# Inversions


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 64, 65, 100, 784, 1024, 1025, 2500])
def test_inversions_against_all_pairs(n: int) -> None:
    rows = np.concatenate([permutations(3, n), [np.arange(n), np.arange(n)[::-1]]]).astype(np.int32)
    before = rows.copy()
    wanted = [int(np.triu(row[:, None] > row).sum()) for row in rows]
    assert inversions(rows).tolist() == wanted
    assert np.array_equal(rows, before)


def test_inversions_of_small_rows_one_by_one() -> None:
    rows = np.array(list(itertools.permutations(range(5))), np.int32)
    wanted = [sum(x > y for x, y in itertools.combinations(row, 2)) for row in rows.tolist()]
    assert inversions(rows).tolist() == wanted


def test_inversions_of_the_largest_maps_do_not_overflow() -> None:
    n = 512 * 512
    rows = np.stack([np.arange(n)[::-1], np.roll(np.arange(n), 1), permutations(1, n)[0]]).astype(np.int32)
    found = inversions(rows).tolist()
    assert found[:2] == [n * (n - 1) // 2, n - 1]
    tau = stats.kendalltau(np.arange(n), rows[2])[0]
    assert 1 - 4 * found[2] / (n * (n - 1)) == pytest.approx(tau, abs=1e-12)


# Correlations of ranks


def test_correlations_of_ranks_against_scipy_in_a_batch_of_rows_with_and_without_ties(mixed: Pairs) -> None:
    a, b = mixed
    for metric, oracle in ((Spearman(), stats.spearmanr), (Kendall(), stats.kendalltau)):
        wanted = [oracle(x, y)[0] for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
        near = {"abs": 1e-12} if a.dtype == torch.float64 else {"abs": 1e-6}
        assert metric(a, b).tolist() == pytest.approx(wanted, **near)
        assert metric(b, a).tolist() == pytest.approx(wanted, **near)
        for row in range(len(a)):
            assert torch.equal(metric(a[row : row + 1], b[row : row + 1]), metric(a, b)[row : row + 1])


def test_figures_do_not_depend_on_how_many_rows_are_seen_together(
    mixed: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = [metric(*mixed) for metric in (spearman, kendall_tau)]
    for at_once in (1, 2 * 77, 3 * 77 + 5):
        monkeypatch.setattr(ranking, "_AT_ONCE", at_once)
        for metric, wanted in zip((spearman, kendall_tau), together, strict=True):
            assert torch.equal(metric(*mixed), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correlations_of_one_and_two_pixels(dtype: torch.dtype) -> None:
    rising, falling = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[5.0, -3.0]], dtype=dtype)
    for metric in (Pearson(), Spearman(), Kendall()):
        assert metric(rising, rising).item() == pytest.approx(1, abs=1e-6)
        assert metric(rising, falling).item() == pytest.approx(-1, abs=1e-6)
        assert metric(rising, torch.full_like(rising, 2)).isnan().all()
        assert metric(rising[:, :1], falling[:, :1]).isnan().all()


def test_equal_and_opposite_orders_are_exactly_one_and_minus_one() -> None:
    a = drawn(3, 1000, dtype=torch.float32)
    for metric in (Spearman(), Kendall()):
        assert metric(a, a.exp()).tolist() == [1, 1, 1]
        assert metric(a, -a).tolist() == [-1, -1, -1]


def test_a_single_tie_of_zero_and_minus_zero_counts() -> None:
    a, b = torch.tensor([[-0.0, 0.0, 1.0, -1.0]]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    # Five of six pairs are untied in a, and all of these are concordant.
    assert Kendall()(a, b).item() == pytest.approx(5 / np.sqrt(5 * 6))
    assert Spearman()(a, b).item() == pytest.approx(stats.spearmanr(a[0], b[0])[0])


def test_maps_of_imagenet_size_take_little_memory() -> None:
    a, b = (drawn(64, 224 * 224, seed, torch.float32) for seed in (0, 1))
    tracemalloc.start()
    found = Kendall()(a, a + b), Spearman()(a, a + b), TopK()(a, a + b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The batch is 13 MB; an order of all its pixels at once would be 26 MB, twice over.
    assert peak < 40e6
    x, y = a[5].numpy(), (a + b)[5].numpy()
    assert found[0][5].item() == pytest.approx(stats.kendalltau(x, y)[0], abs=1e-6)
    assert found[1][5].item() == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-6)


# Top pixels


@pytest.mark.parametrize("k", [1, 2, 10, 76, 77])
def test_shared_top_pixels_are_the_overlap_of_memberships(mixed: Pairs, k: int) -> None:
    a, b = mixed
    wanted = torch.minimum(ops.top_k(a, k), ops.top_k(b, k)).sum(1)
    torch.testing.assert_close(top_k_shared(a, b, k), wanted)
    torch.testing.assert_close(top_k_shared(b, a, k), wanted)
    for row in (0, 1, 2):  # Where no tie is at the last place, sets say the same.
        sets = [set(np.argsort(rows[row].numpy())[-k:].tolist()) for rows in (a, b)]
        if all(len({*rows[row].tolist()}) == 77 for rows in (a, b)):
            assert top_k_shared(a, b, k)[row].item() == len(sets[0] & sets[1])


# Correlations of values


def test_the_cosine_of_rows_of_any_size() -> None:
    a, b = drawn(3, 40), drawn(3, 40, seed=1)
    # Only one sign, and both: what a row is divided by must be its largest magnitude.
    for rows in (a, a.abs(), -a.abs()):
        wanted = torch.cosine_similarity(rows, b)
        for factor in (1e-300, 1.0, 1e300):
            torch.testing.assert_close(Cosine()(rows * factor, b), wanted)
            torch.testing.assert_close(Cosine()(b, rows * factor), wanted)
    assert Cosine()(torch.zeros_like(a), b).isnan().all()


def test_pearson_of_rows_of_any_size_and_its_gradient() -> None:
    a, b = drawn(3, 40), drawn(3, 40, seed=1)
    wanted = torch.tensor([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    for factor in (1e-300, 1e-150, 1.0, 1e150, 1e300):
        torch.testing.assert_close(Pearson()(a * factor, b / factor), wanted)
    # Rows below 0, and up to 0.
    for below in (-a.exp(), -a.relu()):
        wanted = torch.tensor([np.corrcoef(x, y)[0, 1] for x, y in zip(below.numpy(), b.numpy(), strict=True)])
        torch.testing.assert_close(Pearson()(below, b), wanted)
        torch.testing.assert_close(Pearson()(b, below), wanted)
    flat = torch.full((3, 40), 0.1, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(Pearson()(flat, b).nan_to_num().sum(), flat)[0].any()
    assert torch.autograd.gradcheck(lambda rows: Pearson()(rows, b), a[:, :40].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda rows: Pearson()(rows, b), a.clone().requires_grad_())
