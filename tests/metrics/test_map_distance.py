"""Map metrics and map scores against scipy, scikit-image, torchmetrics, Quantus and slow loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.metrics import (
    HOG,
    MSE,
    SSIM,
    CenterShift,
    Complexity,
    Cosine,
    EarthMover,
    Entropy,
    Kendall,
    MapScore,
    MassInside,
    Pearson,
    Sparseness,
    Spearman,
    TopK,
    base,
)
from robustexplain.metrics.ranking import inversions
from robustexplain.metrics.structure import hog, ssim
from robustexplain.registry import METRICS


def some_maps(batch: int = 4, seed: int = 0, height: int = 32, width: int = 32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, height, width, generator=rng, dtype=torch.float64)


@pytest.fixture
def a() -> Tensor:
    return some_maps()


@pytest.fixture
def b(a: Tensor) -> Tensor:
    return 0.5 * a + some_maps(seed=1)


def tied(maps: Tensor) -> Tensor:
    """The same with few distinct values."""
    return (3 * maps).round()


def rows(function: Callable[[np.ndarray, np.ndarray], float], a: Tensor, b: Tensor) -> list[float]:
    return [float(function(x.numpy().ravel(), y.numpy().ravel())) for x, y in zip(a, b, strict=True)]


def rescaled(m: np.ndarray) -> np.ndarray:
    return (m - m.min()) / (m.max() - m.min())


# Correlations


def test_correlations_against_scipy_with_and_without_ties(a: Tensor, b: Tensor) -> None:
    stats = pytest.importorskip("scipy.stats")
    for x, y in ((a, b), (tied(a), tied(b)), (tied(a), b), (a.relu(), b.relu())):
        for metric, oracle in (
            (Pearson(), stats.pearsonr),
            (Spearman(), stats.spearmanr),
            (Kendall(), stats.kendalltau),
        ):
            wanted = rows(lambda u, v, oracle=oracle: oracle(u, v)[0], x, y)  # type: ignore[misc]
            assert metric(x, y).tolist() == pytest.approx(wanted, abs=1e-12)


def test_correlations_of_magnitudes_are_those_of_the_absolute_maps(a: Tensor, b: Tensor) -> None:
    for kind in (Spearman, Kendall):
        torch.testing.assert_close(kind(magnitude=True)(a, b), kind()(a.abs(), b.abs()))
        assert not torch.allclose(kind(magnitude=True)(a, b), kind()(a, b))


def test_correlations_agree_with_torchmetrics(a: Tensor, b: Tensor) -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    x, y = a.flatten(1).T.contiguous(), b.flatten(1).T.contiguous()
    loose = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(Pearson()(a, b), functional.pearson_corrcoef(x, y), **loose)
    torch.testing.assert_close(Spearman()(a, b), functional.spearman_corrcoef(x, y), **loose)
    few = tied(a)[:2, :8], tied(b)[:2, :8]
    pairs = zip(*(m.flatten(1) for m in few), strict=True)
    wanted = torch.stack([functional.kendall_rank_corrcoef(*pair) for pair in pairs])
    torch.testing.assert_close(Kendall()(*few), wanted, **loose)


def test_inversions_are_the_pairs_out_of_order() -> None:
    for n in (1, 2, 3, 7, 8, 9, 33):
        p = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(s)) for s in range(3)])
        wanted = [sum(x > y for x, y in itertools.combinations(row, 2)) for row in p.tolist()]
        assert inversions(p.numpy().astype(np.int32)).tolist() == wanted


def test_kendalls_tau_of_a_hand_counted_example() -> None:
    # a: 1 2 2 3, b: 1 3 2 2. Five pairs are untied in each; 3 concordant, 1 discordant, 1 each tied: (3 - 1) / 5.
    found = Kendall()(torch.tensor([[[1.0, 2.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 3.0, 2.0, 2.0]]]))
    assert found.item() == pytest.approx(0.4)


def test_kendall_takes_maps_of_224_pixels_in_float32() -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = some_maps(1, 0, 224, 224).float(), some_maps(1, 1, 224, 224).float()
    y = x + y
    wanted = stats.kendalltau(x.numpy().ravel(), y.numpy().ravel())[0]
    assert Kendall()(x, y).item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("metric", [Spearman(), Kendall(), TopK(magnitude=False), TopK(k=7, magnitude=False)], ids=str)
def test_rank_metrics_only_see_the_order(metric: Spearman, a: Tensor, b: Tensor) -> None:
    for rising in (torch.exp, lambda m: m**3, lambda m: 5 * m - 2):
        torch.testing.assert_close(metric(rising(a), b), metric(a, b))  # type: ignore[no-untyped-call]
        torch.testing.assert_close(metric(rising(tied(a)), b), metric(tied(a), b))  # type: ignore[no-untyped-call]


def test_pearson_ignores_scale_and_offset_but_not_the_sign(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(Pearson()(3 * a + 2, b), Pearson()(a, b))
    torch.testing.assert_close(Pearson()(-a, b), -Pearson()(a, b))


# Structure


@pytest.mark.parametrize("size", [(11, 11), (32, 32), (17, 40)])
def test_ssim_against_scikit_image(size: tuple[int, int]) -> None:
    skimage = pytest.importorskip("skimage.metrics")
    a, b = some_maps(3, 0, *size), some_maps(3, 1, *size) * 0.3
    b = a + b

    def oracle(x: np.ndarray, y: np.ndarray) -> float:
        return float(
            skimage.structural_similarity(
                x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )

    wanted = [oracle(rescaled(x.numpy()), rescaled(y.numpy())) for x, y in zip(a, b, strict=True)]
    assert SSIM()(a, b).tolist() == pytest.approx(wanted, abs=1e-10)
    # On raw maps with their own range, the same definition.
    raw = [
        skimage.structural_similarity(
            x.numpy(), y.numpy(), data_range=7.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert SSIM("none", 7.0)(a, b).tolist() == pytest.approx(raw, abs=1e-10)


def test_ssim_of_a_small_map_against_a_slow_loop() -> None:
    # 7 pixels high: the window is cut to 7, so it fits in one row of places.
    a, b = some_maps(1, 0, 7, 9)[0].numpy(), some_maps(1, 1, 7, 9)[0].numpy()
    weights = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    window = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for column in range(3):
        x, y = a[:, column : column + 7], b[:, column : column + 7]
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy, vxy = ((window * p).sum() - q for p, q in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
        values.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    found = ssim(torch.tensor(a)[None], torch.tensor(b)[None], 1.0)
    assert found.item() == pytest.approx(np.mean(values))


def test_ssim_of_a_batch_is_that_of_its_parts(a: Tensor, b: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.cat([m, m.flip(1)[:3]]).requires_grad_() for m in (a, b))
    together = SSIM()(a, b)
    slopes = torch.autograd.grad(together.square().sum(), (a, b))
    for maps_at_once in (1, 2, 3, 7):
        monkeypatch.setattr(base, "_AT_ONCE", maps_at_once * 32 * 32)
        found = SSIM()(a, b)
        torch.testing.assert_close(found, together)
        for slope, wanted in zip(torch.autograd.grad(found.square().sum(), (a, b)), slopes, strict=True):
            torch.testing.assert_close(slope, wanted)


def test_scores_and_places_of_a_batch_are_those_of_its_parts(a: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    region = a > a.mean((1, 2), keepdim=True)
    together = Complexity()(a), MassInside()(a, region)
    monkeypatch.setattr(base, "_AT_ONCE", 32 * 32)
    seen: list[int] = []
    score = Complexity._measure
    monkeypatch.setattr(Complexity, "_measure", lambda self, maps: seen.append(len(maps)) or score(self, maps))
    torch.testing.assert_close(Complexity()(a), together[0])
    torch.testing.assert_close(MassInside()(a, region), together[1])
    assert seen == [1] * len(a)


def test_torchmetrics_ssim_differs_only_by_its_borders() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    a = some_maps(1, 0, 64, 64).sigmoid()
    b = (a + 0.1 * some_maps(1, 1, 64, 64)).clamp(0, 1)
    _, full = functional.structural_similarity_index_measure(
        a[:, None], b[:, None], data_range=1.0, return_full_image=True
    )
    inner = full[0, 0, 5:-5, 5:-5].mean().item()
    assert ssim(a, b, 1.0).item() == pytest.approx(inner, abs=1e-6)


@pytest.mark.parametrize("cell,size", [(8, (32, 32)), (16, (64, 50)), (7, (30, 41)), (4, (12, 12))])
def test_hog_against_scikit_image(cell: int, size: tuple[int, int]) -> None:
    feature = pytest.importorskip("skimage.feature")
    maps = some_maps(3, 2, *size)
    maps[1, 5:9] = 0.0  # pixels without a gradient vote for nothing
    wanted = np.stack([feature.hog(m.numpy(), pixels_per_cell=(cell, cell), block_norm="L2-Hys") for m in maps])
    # scikit-image adds up a cell's votes in float32.
    np.testing.assert_allclose(hog(maps, cell), wanted, atol=1e-6)
    other = some_maps(3, 3, *size) + maps
    stats = pytest.importorskip("scipy.stats")
    pairs = [
        [feature.hog(rescaled(m.numpy()), pixels_per_cell=(cell, cell), block_norm="L2-Hys") for m in pair]
        for pair in zip(maps, other, strict=True)
    ]
    assert HOG(cell)(maps, other).tolist() == pytest.approx([stats.pearsonr(*pair)[0] for pair in pairs], abs=1e-6)


def test_hog_of_a_map_smaller_than_a_block_takes_smaller_cells() -> None:
    feature = pytest.importorskip("skimage.feature")
    maps = some_maps(2, 2, 14, 14)
    wanted = np.stack([feature.hog(m.numpy(), pixels_per_cell=(4, 4), block_norm="L2-Hys") for m in maps])
    np.testing.assert_allclose(hog(maps, 16), wanted, atol=1e-6)


# Pixels


def test_mse_under_each_rescaling(a: Tensor, b: Tensor) -> None:
    def shared(m: np.ndarray) -> np.ndarray:
        return np.abs(m) / np.abs(m).sum()

    how = {"none": lambda m: m, "minmax": rescaled, "absmax": lambda m: m / np.abs(m).max(), "sum": shared}
    for name, function in how.items():
        wanted = rows(lambda x, y, f=function: ((f(x) - f(y)) ** 2).mean(), a, b)  # type: ignore[misc, no-untyped-call]
        assert MSE(name)(a, b).tolist() == pytest.approx(wanted)  # type: ignore[arg-type]


def test_cosine_against_scipy_and_torch(a: Tensor, b: Tensor) -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    assert Cosine()(a, b).tolist() == pytest.approx([1 - d for d in rows(distance.cosine, a, b)])
    torch.testing.assert_close(Cosine()(a * 1e-200, b), torch.cosine_similarity(a.flatten(1), b.flatten(1)))
    assert Cosine()(a, -2 * a).tolist() == pytest.approx([-1.0] * 4)
    assert Cosine()(a * 0, a).isnan().all()


# Places


@pytest.mark.parametrize("k", [1, 10, 100, 0.1])
def test_top_k_against_sorting(k: float, a: Tensor, b: Tensor) -> None:
    count = int(k * 1024) if k < 1 else int(k)

    def shared(x: np.ndarray, y: np.ndarray) -> float:
        return len(set(np.argsort(-np.abs(x))[:count]) & set(np.argsort(-np.abs(y))[:count])) / count

    assert TopK(k)(a, b).tolist() == pytest.approx(rows(shared, a, b))


def test_top_k_does_not_depend_on_the_order_of_tied_pixels(a: Tensor, b: Tensor) -> None:
    mixed = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    x, y = tied(a), tied(b)
    shuffled = [m.flatten(1)[:, mixed].reshape(m.shape) for m in (x, y)]
    torch.testing.assert_close(TopK()(*shuffled), TopK()(x, y))
    assert TopK(4)(torch.ones(1, 4, 4), torch.ones(1, 4, 4)).item() == 1.0
    # Two deltas share no first place; the three places left are split among 15 equal pixels each.
    first, second = torch.zeros(2, 1, 4, 4)
    first[0, 0, 0], second[0, 3, 3] = 1, 1
    assert TopK(4)(first, second).item() == pytest.approx((14 * 0.2 + 2 * 0.2) / 4)


def test_a_k_that_is_no_count_is_refused() -> None:
    for k in (0.0, -1.0, 2.5):
        with pytest.raises(InputError, match=r"TopK\.k must be"):
            TopK(k)


def test_the_center_moves_as_far_as_the_mass() -> None:
    a, b = torch.zeros(2, 1, 20, 30).double()
    a[0, 2:4, 3:7], b[0, 5:7, 7:11] = 1.0, -3.0
    assert CenterShift()(a, b).item() == pytest.approx(5.0)
    assert CenterShift()(a, 7 * a).item() == pytest.approx(0.0)
    # A background of 1 leaves the centre of the rescaled map where it was.
    assert CenterShift("minmax")(a + 1, a).item() == pytest.approx(0.0)
    assert CenterShift()(a + 1, a).item() > 1


def test_each_projection_of_the_earth_movers_distance_against_scipy(a: Tensor, b: Tensor) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = a[:2, :9, :13], b[:2, :9, :13]
    y, x = np.mgrid[:9, :13]
    for directions in (1, 2, 7):
        wanted = []
        for first, second in zip(a.abs().numpy(), b.abs().numpy(), strict=True):
            at = [math.pi * i / directions for i in range(directions)]
            lines = [(math.sin(angle) * y + math.cos(angle) * x).ravel() for angle in at]
            costs = [stats.wasserstein_distance(p, p, first.ravel(), second.ravel()) for p in lines]
            wanted.append(np.mean(costs))
        assert EarthMover(directions)(a, b).tolist() == pytest.approx(wanted, abs=1e-10)


def test_the_sliced_distance_never_exceeds_the_exact_one() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    y, x = np.mgrid[:4, :4]
    places = np.stack([y.ravel(), x.ravel()], 1)
    cost = np.linalg.norm(places[:, None] - places[None], axis=2)
    n = len(places)
    sums = np.concatenate([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
    for seed in range(3):
        a, b = some_maps(2, seed, 4, 4).abs()
        mass = np.concatenate([(m / m.sum()).numpy().ravel() for m in (a, b)])
        exact = optimize.linprog(cost.ravel(), A_eq=sums, b_eq=mass).fun
        found = EarthMover()(a[None], b[None]).item()
        assert 0.4 * exact < found < exact


def test_mass_moved_by_d_pixels_is_at_two_d_over_pi() -> None:
    a, b = torch.zeros(2, 1, 30, 30).double()
    a[0, 3, 4], b[0, 15, 20] = 2.0, 5.0
    assert EarthMover(64)(a, b).item() == pytest.approx(2 * 20 / math.pi, rel=1e-3)


# Scores of one map


SCORES: list[MapScore] = [
    entry.build()
    for entry in METRICS
    if issubclass(entry.build, MapScore) and "images" in entry.build.takes  # type: ignore[arg-type]
]
DEGENERATE = {"zero": torch.zeros(1, 5, 5), "flat": torch.full((1, 5, 5), -0.3), "single": torch.ones(1, 1, 1)}


@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
def test_a_score_is_bounded_batch_independent_and_has_the_right_gradient(score: MapScore, a: Tensor) -> None:
    found = score(a)
    assert ((found >= score.bounds[0]) & (found <= score.bounds[1])).all()
    torch.testing.assert_close(found, torch.cat([score(m[None]) for m in a]))
    torch.testing.assert_close(score(1e-6 * a), found)
    assert score(a.bfloat16()).dtype == torch.bfloat16
    assert score.better in ("higher", "lower")
    if score.differentiable:
        assert torch.autograd.gradcheck(score, a[:2, :4, :4].clone().requires_grad_()) is True
    for name, degenerate in DEGENERATE.items():
        given = degenerate.clone().requires_grad_()
        value = score(given)
        assert value.isfinite().all() or "NaN" in (type(score).__doc__ or ""), name
        if score.differentiable:
            assert torch.isfinite(torch.autograd.grad(value.sum(), given)[0]).all(), name


@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
def test_a_score_refuses_what_is_no_map(score: MapScore, a: Tensor) -> None:
    with pytest.raises(InputError, match=r"shape \[B, H, W\]"):
        score(a[0, 0])
    with pytest.raises(InputError, match="NaN or infinity"):
        score(a / 0)
    with pytest.raises(InputError, match="floating point"):
        score(a.long())


def test_complexity_and_sparseness_against_quantus(a: Tensor) -> None:
    quantus = pytest.importorskip("quantus")
    given = a.abs()[:, None].numpy()
    for metric, oracle in ((Complexity(), quantus.Complexity), (Sparseness(), quantus.Sparseness)):
        made = oracle(disable_warnings=True)
        # Quantus adds 1e-12 inside the logarithm and 1e-7 to every value.
        wanted = made.evaluate_batch(x_batch=given, a_batch=given.copy())
        assert metric(a).tolist() == pytest.approx(list(wanted), abs=1e-5)
    torch.testing.assert_close(Entropy()(a), Complexity()(a))


def test_scores_at_their_ends() -> None:
    flat, one = torch.full((1, 4, 4), 0.7), torch.zeros(1, 4, 4)
    one[0, 1, 2] = -3
    assert Complexity()(flat).item() == pytest.approx(math.log(16))
    assert Complexity()(one).item() == 0.0
    assert Sparseness()(flat).item() == pytest.approx(0.0, abs=1e-6)
    assert Sparseness()(one).item() == pytest.approx(15 / 16)
