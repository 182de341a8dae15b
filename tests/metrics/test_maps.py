"""Operations on maps and numbers about them, on degenerate maps too."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import FewScoresWarning, InputError
from robustexplain.metrics import (
    L1,
    L2,
    LENS,
    IoU,
    MapMetric,
    accuracy,
    auc,
    confidence,
    detected_at,
    hit,
    joint_success,
    threshold_at,
)
from robustexplain.registry import METRICS


def some_maps(batch: int = 4, seed: int = 0, side: int = 7) -> Tensor:
    return torch.randn(batch, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def m() -> Tensor:
    return some_maps()


ONE_PIXEL = torch.zeros(1, 5, 5, dtype=torch.float64).index_put((torch.tensor([0]),) * 3, torch.tensor(1.0).double())
DEGENERATE = {
    "zero": torch.zeros(1, 5, 5, dtype=torch.float64),
    "constant": torch.full((1, 5, 5), 0.3, dtype=torch.float64),
    "negative constant": torch.full((1, 5, 5), -2.0, dtype=torch.float64),
    "one pixel": ONE_PIXEL,
    "one by one": torch.ones(1, 1, 1, dtype=torch.float64),
    "tiny": ONE_PIXEL * 1e-30,
}
RESCALES = ("none", "minmax", "absmax", "sum")


# Operations on maps


def test_rescalings_against_numpy(m: Tensor) -> None:
    for row, minmax, absmax, total in zip(m, ops.minmax(m), ops.absmax(m), ops.unit_sum(m), strict=True):
        a = row.numpy()
        np.testing.assert_allclose(minmax, (a - a.min()) / (a.max() - a.min()))
        np.testing.assert_allclose(absmax, a / np.abs(a).max())
        np.testing.assert_allclose(total, np.abs(a) / np.abs(a).sum())


def test_rescaling_by_name(m: Tensor) -> None:
    assert ops.rescale(m, "none") is m
    for how, function in (("minmax", ops.minmax), ("absmax", ops.absmax), ("sum", ops.unit_sum)):
        assert torch.equal(ops.rescale(m, how), function(m))  # type: ignore[arg-type]


@pytest.mark.parametrize("how", RESCALES[1:])
def test_rescaled_maps_do_not_depend_on_scale_or_batch(how: ops.Rescale, m: Tensor) -> None:
    scaled = m * torch.tensor([1e-6, 1.0, 3.0, 1e6]).double()[:, None, None]
    torch.testing.assert_close(ops.rescale(scaled, how), ops.rescale(m, how))
    torch.testing.assert_close(ops.rescale(m, how)[2:3], ops.rescale(m[2:3], how))


@pytest.mark.parametrize("how", RESCALES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_maps_rescale_to_finite_values_with_finite_gradients(how: ops.Rescale, name: str) -> None:
    for dtype in (torch.float64, torch.float32):
        given = DEGENERATE[name].to(dtype).requires_grad_()
        found = ops.rescale(given, how)
        (gradient,) = torch.autograd.grad((found * torch.arange(found.numel()).reshape(found.shape)).sum(), given)
        assert torch.isfinite(found).all()
        assert torch.isfinite(gradient).all()


def test_a_constant_map_becomes_zeros_without_a_gradient() -> None:
    for name in ("zero", "constant", "negative constant", "one by one"):
        given = DEGENERATE[name].clone().requires_grad_()
        found = ops.minmax(given)
        assert not found.any()
        assert not torch.autograd.grad(found.square().sum() + found.sum(), given)[0].any()


def test_a_zero_map_stays_zero_under_every_rescaling() -> None:
    for how in RESCALES:
        assert not ops.rescale(DEGENERATE["zero"], how).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("how", RESCALES)
def test_rescalings_have_the_right_gradient(how: ops.Rescale, m: Tensor) -> None:
    assert torch.autograd.gradcheck(lambda v: ops.rescale(v, how), m[:2, :3, :3].clone().requires_grad_()) is True


def test_resize_keeps_the_same_tensor_at_the_same_size_and_constants_at_any(m: Tensor) -> None:
    assert ops.resize(m, (7, 7)) is m
    assert torch.equal(ops.resize(torch.full((2, 3, 3), 0.5), (8, 5)), torch.full((2, 8, 5), 0.5))


def test_resize_is_bilinear_between_pixel_centres() -> None:
    found = ops.resize(torch.tensor([[[0.0, 4.0]]]), (1, 4))
    assert found.tolist() == [[[0.0, 1.0, 3.0, 4.0]]]


def test_pool_averages_blocks() -> None:
    assert ops.pool(torch.arange(16.0).reshape(1, 4, 4), 2).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]


def test_total_variation_against_a_slow_loop(m: Tensor) -> None:
    for row, found in zip(m.tolist(), ops.total_variation(m).tolist(), strict=True):
        down = [(row[i + 1][j] - row[i][j]) ** 2 for i in range(6) for j in range(7)]
        right = [(row[i][j + 1] - row[i][j]) ** 2 for i in range(7) for j in range(6)]
        assert found == pytest.approx(sum(down) / 42 + sum(right) / 42)


def test_expand_broadcasts_a_number_a_sample() -> None:
    assert ops.expand(torch.ones(3), torch.ones(3, 1, 4, 4)).shape == (3, 1, 1, 1)


def test_shares_sum_to_one_and_a_zero_map_is_flat(m: Tensor) -> None:
    found = ops.distribution(m)
    np.testing.assert_allclose(found[0], np.abs(m[0].numpy()).ravel() / np.abs(m[0].numpy()).sum())
    for name, degenerate in DEGENERATE.items():
        assert ops.distribution(degenerate).sum().item() == pytest.approx(1.0), name
    assert ops.distribution(DEGENERATE["zero"]).tolist() == [[1 / 25] * 25]
    given = DEGENERATE["zero"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.distribution(given).square().sum(), given)
    assert not gradient.any()


def test_entropy_against_scipy_and_at_its_ends(m: Tensor) -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = [stats.entropy(np.abs(row.numpy()).ravel()) for row in m]
    assert ops.entropy(m).tolist() == pytest.approx(wanted)
    assert ops.entropy(ONE_PIXEL).item() == 0.0
    assert ops.entropy(DEGENERATE["constant"]).item() == pytest.approx(math.log(25))
    assert torch.autograd.gradcheck(ops.entropy, m[:2, :3, :3].clone().requires_grad_())
    given = ONE_PIXEL.clone().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(ops.entropy(given).sum(), given)[0]).all()


def test_the_center_of_a_delta_is_its_place_and_of_a_flat_map_the_middle() -> None:
    delta = torch.zeros(1, 6, 9)
    delta[0, 4, 7] = -2.0
    assert ops.center_of_mass(delta).tolist() == [[4.0, 7.0]]
    assert ops.center_of_mass(torch.zeros(1, 6, 9)).tolist() == [[pytest.approx(2.5), pytest.approx(4.0)]]


def test_center_of_mass_against_scipy(m: Tensor) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    wanted = [ndimage.center_of_mass(np.abs(row[:, :5].numpy())) for row in m]
    np.testing.assert_allclose(ops.center_of_mass(m[:, :, :5]), wanted)


def test_a_k_is_a_count_or_a_share() -> None:
    assert [ops.top_k_count(k, 49) for k in (0.1, 0.001, 1, 5.0, 1000)] == [4, 1, 1, 5, 49]
    assert ops.top_k_count(0.29, 100) == 29


def test_top_k_names_the_largest_and_splits_ties() -> None:
    maps = torch.tensor([[[5.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]])
    assert ops.top_k(maps, 2).tolist() == [[1.0, 0.0, 0.5, 0.5], [0.5] * 4]


def test_correlation_of_tiny_huge_and_constant_rows(m: Tensor) -> None:
    a, b = m.flatten(1), some_maps(seed=1).flatten(1)
    wanted = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    for factor in (1e-200, 1.0, 1e200):
        assert ops.correlation(a * factor, b).tolist() == pytest.approx(wanted)
    given = torch.full((2, 5), 0.3, requires_grad=True)
    found = ops.correlation(given, torch.arange(10.0).reshape(2, 5))
    assert found.isnan().all()
    assert not torch.autograd.grad(found.sum(), given)[0].any()


def test_the_sign_vector_of_an_example() -> None:
    # Magnitudes 5, 1, 1, 4, 0, 1: mean 2, standard deviation sqrt(44/6 - 4) = 1.83.
    found = ops.sign_vector(torch.tensor([[[5.0, -1.0, 1.0], [-4.0, 0.0, 1.0]]]))
    assert found.tolist() == [[1.0, 0.0, 0.0, -1.0, 0.0, 0.0]]
    for name in ("zero", "constant", "negative constant", "one by one"):
        assert not ops.sign_vector(DEGENERATE[name]).any(), name


def test_the_frame_is_a_seventh_wide() -> None:
    for side, width in ((7, 1), (14, 2), (224, 32), (5, 1), (32, 4)):
        frame = ops.frame(torch.zeros(1, side, side))
        assert not frame[width : side - width, width : side - width].any()
        assert frame.sum().item() == side**2 - (side - 2 * width) ** 2
    assert ops.frame(torch.zeros(1, 2, 2)).all()


# Distances


DISTANCES: list[MapMetric] = [entry.build() for entry in METRICS if issubclass(entry.build, MapMetric)]  # type: ignore[arg-type]
PIXELWISE: list[MapMetric] = [L1(), L2(), IoU()]
"""Those that rescale maps to ``[0, 1]`` and go pixel by pixel."""


@pytest.fixture(params=DISTANCES, ids=lambda metric: type(metric).__name__)
def metric(request: pytest.FixtureRequest) -> MapMetric:
    found: MapMetric = request.param
    return found


def rescaled(a: Tensor) -> np.ndarray:
    b: np.ndarray = a.numpy()
    return (b - b.min()) / (b.max() - b.min())


SLOW: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "L1": lambda a, b: float(np.abs(a - b).mean()),
    "L2": lambda a, b: float(np.linalg.norm(a - b) / np.sqrt(a.size)),
    "IoU": lambda a, b: float(((a >= 0.5) & (b >= 0.5)).sum() / ((a >= 0.5) | (b >= 0.5)).sum()),
}


@pytest.mark.parametrize("metric", PIXELWISE, ids=lambda metric: type(metric).__name__)
def test_metrics_agree_with_numpy_sample_by_sample(metric: MapMetric, m: Tensor) -> None:
    other = m + 0.5 * some_maps(seed=1)
    found = metric(m, other)
    wanted = [SLOW[type(metric).__name__](rescaled(a), rescaled(b)) for a, b in zip(m, other, strict=True)]
    assert found.shape == (4,)
    assert found.tolist() == pytest.approx(wanted)
    assert len(set(wanted)) == 4


def test_every_registered_metric_of_the_kind_is_tested() -> None:
    names = {METRICS.name_of(type(metric)) for metric in DISTANCES}
    assert {"l1", "l2", "iou", "mse", "pearson", "spearman", "kendall", "top-k", "ssim", "hog", "cosine"} <= names
    assert {"center-shift", "emd", "sign-correlation"} <= names


def test_metrics_are_symmetric_and_bounded(metric: MapMetric, m: Tensor) -> None:
    low, high = metric.bounds
    for other in (some_maps(seed=1), -m, torch.zeros_like(m), torch.ones_like(m)):
        found = metric(m, other)
        assert (((found >= low) & (found <= high)) | found.isnan()).all()
        # The recall of one way round is the precision of the other.
        back = replace(metric, of="precision") if isinstance(metric, LENS) else metric
        torch.testing.assert_close(found, back(other, m), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_undefined_figures_are_documented_and_have_no_gradient(metric: MapMetric, m: Tensor) -> None:
    documented = "NaN" in (type(metric).__doc__ or "")
    for name, degenerate in DEGENERATE.items():
        for other in (degenerate, torch.zeros_like(degenerate), some_maps(1)[:, : degenerate.shape[1]][..., :5]):
            if other.shape != degenerate.shape:
                continue
            given = degenerate.clone().requires_grad_()
            found = metric(given, other)
            assert found.isfinite().all() or documented, name
            if metric.differentiable:
                assert torch.isfinite(torch.autograd.grad(found.sum(), given)[0]).all(), name
    assert metric(m, some_maps(seed=1)).isfinite().all()


def test_a_map_equals_itself(metric: MapMetric, m: Tensor) -> None:
    equal = 1.0 if metric.higher_is_closer else 0.0
    assert metric(m, m.clone()).tolist() == pytest.approx([equal] * 4, abs=1e-12)
    for name, degenerate in DEGENERATE.items():
        found = metric(degenerate, degenerate.clone()).item()
        assert found == pytest.approx(equal) or math.isnan(found), name
    one = metric(ONE_PIXEL, ONE_PIXEL.clone()).item()
    assert one == pytest.approx(equal)


@pytest.mark.parametrize("metric", PIXELWISE, ids=lambda metric: type(metric).__name__)
def test_a_map_equals_its_rescalings(metric: MapMetric, m: Tensor) -> None:
    equal = 1.0 if metric.higher_is_closer else 0.0
    assert metric(m, 3 * m + 2).tolist() == pytest.approx([equal] * 4)
    for name, degenerate in DEGENERATE.items():
        assert metric(degenerate, degenerate).item() == equal, name


def test_a_closer_map_scores_closer(metric: MapMetric) -> None:
    # The mean over many maps: a rank or a centre need not move the same way in each.
    maps, noise = some_maps(64), some_maps(64, seed=1)
    near, far = metric(maps, maps + 0.1 * noise).mean(), metric(maps, maps + 2 * noise).mean()
    assert (near > far) if metric.higher_is_closer else (near < far)


def test_a_maps_figure_does_not_depend_on_its_batch(metric: MapMetric, m: Tensor) -> None:
    other = some_maps(seed=1)
    alone = torch.cat([metric(m[i : i + 1], other[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(metric(m, other), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_come_in_the_dtype_of_the_maps(metric: MapMetric, dtype: torch.dtype) -> None:
    a, b = some_maps(side=12).to(dtype), some_maps(seed=1, side=12).to(dtype)
    found = metric(a, b)
    assert found.dtype == dtype
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 8e-3}
    torch.testing.assert_close(found.double(), metric(a.double(), b.double()), **near)


def test_differentiable_metrics_pass_finite_differences(metric: MapMetric) -> None:
    given, other = some_maps(2, side=6).requires_grad_(), some_maps(2, seed=1, side=6)
    if metric.differentiable:
        assert torch.autograd.gradcheck(lambda v: metric(v, other), given) is True
    else:
        assert not metric(given, other).requires_grad or type(metric).__name__ in ("IoU", "TopK")


def test_maps_that_are_no_maps_are_refused(metric: MapMetric, m: Tensor) -> None:
    bad = m.clone()
    bad[2, 0, 0] = math.nan
    with pytest.raises(InputError, match="reference holds NaN or infinity, first in sample 2"):
        metric(m, bad)
    with pytest.raises(InputError, match="maps holds NaN or infinity"):
        metric(m / 0, m)
    with pytest.raises(InputError, match=r"floating point, got torch\.bool"):
        metric(m > 0, m > 0)
    with pytest.raises(InputError, match="got ndarray"):
        metric(m.numpy(), m)
    with pytest.raises(InputError, match="non-empty"):
        metric(m[:0], m[:0])


def test_opposite_maps_are_as_far_as_can_be() -> None:
    a = torch.tensor([[[0.0, 1.0]]])
    assert (L1()(a, -a).item(), L2()(a, -a).item(), IoU()(a, -a).item()) == (1.0, 1.0, 0.0)


def test_iou_counts_pixels_that_reach_its_threshold() -> None:
    a, b = torch.tensor([[[0.0, 0.5, 0.6, 1.0]]]), torch.tensor([[[0.0, 1.0, 0.2, 0.4]]])
    assert IoU()(a, b).item() == pytest.approx(1 / 3)
    assert IoU(0.3)(a, b).item() == pytest.approx(2 / 3)
    assert IoU(0.0)(a, b).item() == 1.0
    with pytest.raises(InputError, match=r"IoU\.threshold must be at most 1"):
        IoU(1.5)


def test_a_constant_map_shares_nothing_with_a_map_that_has_a_region() -> None:
    flat, spot = DEGENERATE["constant"], ONE_PIXEL
    assert IoU()(flat, spot).item() == 0.0
    assert L1()(flat, spot).item() == pytest.approx(1 / 25)


def test_differentiable_metrics_have_finite_gradients_on_equal_maps(metric: MapMetric, m: Tensor) -> None:
    if metric.differentiable:
        given = m.clone().requires_grad_()
        assert torch.isfinite(torch.autograd.grad(metric(given, m).sum(), given)[0]).all()


def test_unequal_shapes_are_refused(metric: MapMetric, m: Tensor) -> None:
    for other in (m[:2], m[:, :5], m[:, None]):
        with pytest.raises(InputError, match=r"equal \[B, H, W\]"):
            metric(m, other)
    with pytest.raises(InputError, match=r"got \[49\] and \[49\]"):
        metric(m[0].flatten(), m[0].flatten())


# Detection


def test_auc_agrees_with_sklearn_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        clean, attacked = rng.integers(levels, size=37), rng.integers(levels, size=21) + 0.3 * (levels > 5) * levels
        labels = np.r_[np.zeros(37), np.ones(21)]
        wanted = roc_auc_score(labels, np.r_[clean, attacked])
        assert auc(torch.tensor(clean).float(), torch.tensor(attacked).float()) == pytest.approx(wanted, abs=1e-12)


def test_auc_of_separated_swapped_and_equal_scores() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, 4.0])
    assert (auc(low, high), auc(high, low), auc(low, low)) == (1.0, 0.0, 0.5)


def test_auc_without_scores_of_both_kinds_is_refused() -> None:
    with pytest.raises(InputError, match="0 clean and 2 attacked"):
        auc(torch.empty(0), torch.ones(2))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 1 / 3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 7, 20, 100])
@pytest.mark.parametrize("levels", [3, 10_000])
def test_a_new_score_exceeds_the_threshold_no_more_often_than_the_rate_and_none_smaller_would_do(
    rate: float, size: int, levels: int
) -> None:
    clean = torch.randint(levels, (size,), generator=torch.Generator().manual_seed(size)).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewScoresWarning)
        threshold = threshold_at(clean, rate)

    def exceeded(at: float) -> float:
        return (1 + int((clean > at).sum())) / (size + 1)

    assert exceeded(threshold) <= rate + 1e-7 or threshold == clean.max()
    smaller = clean[clean < threshold]
    if len(smaller):
        assert exceeded(float(smaller.max())) > rate


@pytest.mark.parametrize("size", [19, 20, 40, 80])
def test_alarms_on_new_clean_scores_are_no_more_frequent_than_asked(size: int) -> None:
    rng = torch.Generator().manual_seed(size)
    found = [
        (torch.randn(500, generator=rng) > threshold_at(torch.randn(size, generator=rng), 0.05)).float().mean()
        for _ in range(600)
    ]
    mean, spread = torch.stack(found).mean(), torch.stack(found).std() / 600**0.5
    assert mean - 3 * spread <= 0.05


def test_a_threshold_needs_scores_and_a_share() -> None:
    with pytest.raises(InputError, match="got none"):
        threshold_at(torch.empty(0), 0.05)
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"false_alarms must lie in \[0, 1\]"):
            threshold_at(torch.rand(5), rate)


def test_the_share_detected_at_a_rate_against_sklearns_curve() -> None:
    roc_curve = pytest.importorskip("sklearn.metrics").roc_curve
    clean = torch.randn(200, generator=torch.Generator().manual_seed(0))
    attacked = torch.randn(150, generator=torch.Generator().manual_seed(1)) + 1
    labels = np.r_[np.zeros(200), np.ones(150)]
    fpr, tpr, _ = roc_curve(labels, np.r_[clean, attacked], drop_intermediate=False)
    for rate in (0.0, 0.05, 0.2, 1.0):
        assert detected_at(clean, attacked, rate) == pytest.approx(tpr[fpr <= rate].max(), abs=1 / 150 + 1e-9)
    assert detected_at(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]), 0.0) == 0.5
    with pytest.raises(InputError, match="2 clean and 0 attacked"):
        detected_at(torch.ones(2), torch.empty(0), 0.05)
    with pytest.raises(InputError, match="NaN"):
        detected_at(torch.ones(2), torch.tensor([math.nan]), 0.05)


# Prediction


def test_accuracy_counts_the_k_likeliest() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    y = torch.randint(5, (60,), generator=torch.Generator().manual_seed(1))
    for k in (1, 3):
        wanted = sklearn.top_k_accuracy_score(y.numpy(), logits.numpy(), k=k, labels=range(5))
        assert accuracy(logits, y, k).double().mean().item() == pytest.approx(wanted)
    assert accuracy(logits, y, 5).all()
    assert not accuracy(torch.zeros(3, 4), torch.tensor([0, 1, 2])).any()
    with pytest.raises(InputError, match=r"k must lie in \[1, 5\], got 6"):
        accuracy(logits, y, 6)
    with pytest.raises(InputError, match="y holds class 7"):
        accuracy(logits, y + 7)


def test_joint_success_takes_all_three() -> None:
    rows = list(itertools.product([False, True], repeat=3))
    wanted, plausible, alarm = torch.tensor(rows).T
    expected = [w and p and not a for w, p, a in rows]
    assert joint_success(wanted, plausible, alarm).tolist() == expected
    assert joint_success(wanted, plausible).tolist() == [w and p for w, p, _ in rows]


def test_a_hit_is_the_goal_class_or_any_wrong_one() -> None:
    logits = torch.eye(3) * 5
    assert hit(logits, torch.tensor([0, 0, 0])).tolist() == [False, True, True]
    assert hit(logits, torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])).tolist() == [False, True, False]


def test_confidence_is_the_goals_probability_or_the_largest_wrong_one() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    y = torch.tensor([0, 0])
    assert confidence(p.log(), y).tolist() == pytest.approx([0.3, 0.7])
    assert confidence(p.log() + 4, y, torch.tensor([2, 1])).tolist() == pytest.approx([0.2, 0.2])
