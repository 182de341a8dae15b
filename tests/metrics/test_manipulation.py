"""Fooling as Heo et al. 2019 measure it: correlations of outstanding pixels, test losses, success rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.metrics import (
    Entropy,
    FooledActive,
    FooledCenter,
    FooledLocation,
    FooledTopK,
    Fooling,
    LocationCorrelation,
    SignCorrelation,
    bi_target_correlation,
    fooling_success_rate,
)
from robustexplain.registry import METRICS


def some_maps(batch: int = 5, seed: int = 0, side: int = 14) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, side, side, generator=rng, dtype=torch.float64)


FOOLING: list[Fooling] = [entry.build() for entry in METRICS if issubclass(entry.build, Fooling)]  # type: ignore[arg-type]


def rescaled(m: np.ndarray) -> np.ndarray:
    return (m - m.min()) / (m.max() - m.min())


def signs(m: np.ndarray) -> np.ndarray:
    size = np.abs(m)
    return np.where(size > size.mean() + size.std(), np.sign(m), 0).ravel()


def frame(side: int) -> np.ndarray:
    inside = range(math.ceil(side / 7), math.ceil(6 * side / 7))
    return np.array([[0.0 if h in inside and w in inside else 1.0 for w in range(side)] for h in range(side)])


def painted(side: int = 14) -> Tensor:
    """What perfect location fooling shows."""
    return torch.tensor(frame(side))[None]


def test_the_sign_correlation_against_numpy() -> None:
    a, b = some_maps(), some_maps() + some_maps(seed=1)
    wanted = [np.corrcoef(signs(x.numpy()), signs(y.numpy()))[0, 1] for x, y in zip(a, b, strict=True)]
    assert SignCorrelation()(a, b).tolist() == pytest.approx(wanted)
    assert SignCorrelation()(a, -a).tolist() == pytest.approx([-1.0] * 5)


def test_the_location_correlation_against_numpy_with_the_papers_frame() -> None:
    a = some_maps()
    wanted = [np.corrcoef(signs(x.numpy()), frame(14).ravel())[0, 1] for x in a]
    assert LocationCorrelation()(a).tolist() == pytest.approx(wanted)
    assert LocationCorrelation()(painted()).item() == pytest.approx(1.0)
    assert LocationCorrelation()(1 - painted()).isnan().all()  # more than half the map stands out from nothing


def test_a_flat_map_has_no_sign_vector() -> None:
    flat = torch.ones(1, 14, 14)
    assert SignCorrelation()(flat, some_maps(1).float()).isnan().all()
    assert LocationCorrelation()(flat).isnan().all()


def test_swapped_explanations_correlate_with_the_other_class() -> None:
    own, other = some_maps(), some_maps(seed=1)
    swapped = bi_target_correlation(other + 0.1 * own, own, other)
    honest = bi_target_correlation(own + 0.1 * other, own, other)
    assert (swapped.other > swapped.own + 0.5).all()
    assert (honest.own > honest.other + 0.5).all()
    torch.testing.assert_close(swapped.own, SignCorrelation()(other + 0.1 * own, own))


def test_entropy_rises_as_a_map_spreads() -> None:
    maps = some_maps().relu()
    entropies = torch.stack([Entropy()(maps + level) for level in (0.0, 0.5, 5.0)])
    assert (entropies.diff(dim=0) > 0).all()


def test_the_location_loss_against_numpy() -> None:
    a = some_maps()
    wanted = [((rescaled(x.numpy()) - frame(14)) ** 2).mean() for x in a]
    assert FooledLocation()(a, a).tolist() == pytest.approx(wanted)
    assert FooledLocation()(painted(), some_maps(1)).item() == 0.0
    assert FooledLocation()(1 - painted(), some_maps(1)).item() == 1.0


def test_the_top_k_loss_looks_where_the_original_was_highest() -> None:
    a, original = some_maps(), some_maps(seed=1)
    wanted = []
    for x, y in zip(a, original, strict=True):
        best = np.argsort(-y.numpy().ravel())[: 196 // 10]
        wanted.append((rescaled(x.numpy()).ravel()[best] ** 2).mean())
    assert FooledTopK()(a, original).tolist() == pytest.approx(wanted)


def test_the_center_loss_is_a_share_of_the_diagonal() -> None:
    a, b = torch.zeros(2, 1, 14, 14).double()
    a[0, 0, 0], b[0, 13, 13] = 1, 1
    assert FooledCenter()(b, a).item() == pytest.approx(1.0)
    b = torch.zeros_like(a)
    b[0, 3, 4] = 1
    # sqrt((3^2 + 4^2) / 2) / 13
    assert FooledCenter()(b, a).item() == pytest.approx(math.sqrt(12.5) / 13)
    wide = torch.zeros(2, 1, 3, 11)
    wide[0, 0, 0, 0], wide[1, 0, 2, 0] = 1, 1
    assert FooledCenter()(*wide).item() == pytest.approx(math.sqrt(0.5))


def test_the_active_loss_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, own, other = some_maps(), some_maps() + some_maps(seed=1), some_maps(seed=2)

    def rank(x: Tensor, y: Tensor) -> float:
        return float(stats.spearmanr(x.numpy().ravel(), y.numpy().ravel())[0])

    wanted = [rank(x, z) - rank(x, y) for x, y, z in zip(a, own, other, strict=True)]
    assert FooledActive()(a, own, other).tolist() == pytest.approx(wanted)
    by_sign = SignCorrelation()(a, other) - SignCorrelation()(a, own)
    torch.testing.assert_close(FooledActive(correlation="sign")(a, own, other), by_sign)
    perfect = [1 - rank(y, z) for y, z in zip(own, other, strict=True)]
    assert FooledActive()(other, own, other).tolist() == pytest.approx(perfect)
    with pytest.raises(InputError, match="active fooling needs other"):
        FooledActive()(a, own)


@pytest.mark.parametrize(
    "metric,low,high",
    [(FooledLocation(), 0, 0.2), (FooledTopK(), 0, 0.3), (FooledCenter(), 0.1, 1), (FooledActive(), 0.5, 2)],
    ids=lambda value: type(value).__name__,
)
def test_success_is_a_loss_in_the_papers_range(metric: Fooling, low: float, high: float) -> None:
    losses = torch.tensor([low - 0.01, low, (low + high) / 2, high, high + 0.01, math.nan], dtype=torch.float64)
    assert metric.success(losses).tolist() == [False, True, True, True, False, False]
    assert (metric.low, metric.high) == (low, high)


def test_the_success_rate_is_the_share_of_fooled_samples() -> None:
    maps = torch.cat([painted(), painted() + 0.1 * some_maps(1), 1 - painted(), some_maps(1)])
    rate = fooling_success_rate(FooledLocation(), maps, some_maps(4))
    assert rate == float(((FooledLocation()(maps, some_maps(4))) <= 0.2).double().mean()) == 0.5
    # As the authors' notebooks count: above 0.15, whatever the kind.
    assert FooledLocation(0.15, math.inf).success(torch.tensor([0.1, 0.2, 3.0])).tolist() == [False, True, True]


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"FooledTopK\.low must not exceed high = 0\.3, got 0\.5"):
        FooledTopK(low=0.5)
    with pytest.raises(InputError, match=r"FooledTopK\.k must be a whole count"):
        FooledTopK(k=1.5)


@pytest.mark.parametrize("metric", FOOLING, ids=lambda metric: type(metric).__name__)
def test_every_loss_keeps_the_contract(metric: Fooling) -> None:
    a, own, other = some_maps(), some_maps(seed=1), some_maps(seed=2)
    found = metric(a, own, other)
    assert ((found >= metric.bounds[0]) & (found <= metric.bounds[1])).all()
    alone = [metric(a[i : i + 1], own[i : i + 1], other[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(found, torch.cat(alone))
    half = [m.bfloat16() for m in (a, own, other)]
    assert metric(*half).dtype == torch.bfloat16
    assert metric.better in ("higher", "lower")
    if metric.differentiable:
        small = [m[:2, :7, :7] for m in (a, own, other)]
        assert torch.autograd.gradcheck(lambda m: metric(m, *small[1:]), small[0].clone().requires_grad_()) is True
        flat = torch.zeros(1, 7, 7, requires_grad=True)
        value = metric(flat, some_maps(1, side=7).float()).sum()
        assert torch.isfinite(torch.autograd.grad(value, flat)[0]).all()
    with pytest.raises(InputError, match=r"equal \[B, H, W\]"):
        metric(a, own[:2], other)
    with pytest.raises(InputError, match="NaN or infinity"):
        metric(a, own, other / 0)
