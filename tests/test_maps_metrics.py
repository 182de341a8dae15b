"""Operations on maps and numbers about them, on degenerate maps too."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.metrics import L1, L2, IoU, MapMetric, auc, confidence, hit, joint_success, threshold_at
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


# Distances


DISTANCES: list[MapMetric] = [entry.build() for entry in METRICS]


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


def test_every_map_metric_has_a_slow_version_to_agree_with() -> None:
    assert {type(metric).__name__ for metric in DISTANCES} <= set(SLOW)


def test_metrics_agree_with_numpy_sample_by_sample(metric: MapMetric, m: Tensor) -> None:
    other = m + 0.5 * some_maps(seed=1)
    found = metric(m, other)
    wanted = [SLOW[type(metric).__name__](rescaled(a), rescaled(b)) for a, b in zip(m, other, strict=True)]
    assert found.shape == (4,)
    assert found.tolist() == pytest.approx(wanted)
    assert len(set(wanted)) == 4


def test_metrics_are_symmetric_and_bounded(metric: MapMetric, m: Tensor) -> None:
    for other in (some_maps(seed=1), -m, torch.zeros_like(m)):
        found = metric(m, other)
        assert ((found >= 0) & (found <= 1)).all()
        assert torch.equal(found, metric(other, m))


def test_a_map_equals_itself_and_its_rescalings(metric: MapMetric, m: Tensor) -> None:
    equal = 1.0 if metric.higher_is_closer else 0.0
    for other in (m, 3 * m + 2):
        assert metric(m, other).tolist() == pytest.approx([equal] * 4)
    for name, degenerate in DEGENERATE.items():
        assert metric(degenerate, degenerate).item() == equal, name


def test_a_closer_map_scores_closer(metric: MapMetric, m: Tensor) -> None:
    noise = some_maps(seed=1)
    near, far = metric(m, m + 0.1 * noise), metric(m, m + 2 * noise)
    assert ((near > far) if metric.higher_is_closer else (near < far)).all()


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


def test_differentiable_metrics_have_finite_gradients_on_equal_maps(m: Tensor) -> None:
    for metric in (L1(), L2()):
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
def test_no_more_than_the_rate_exceeds_the_threshold_and_none_smaller_would_do(
    rate: float, size: int, levels: int
) -> None:
    clean = torch.randint(levels, (size,), generator=torch.Generator().manual_seed(size)).float()
    threshold = threshold_at(clean, rate)
    assert (clean > threshold).float().mean().item() <= rate + 1e-7
    smaller = clean[clean < threshold]
    if len(smaller):
        assert (clean > smaller.max()).double().mean().item() > rate


def test_a_threshold_needs_scores_and_a_share() -> None:
    with pytest.raises(InputError, match="got none"):
        threshold_at(torch.empty(0), 0.05)
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"false_alarms must lie in \[0, 1\]"):
            threshold_at(torch.rand(5), rate)


# Prediction


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
