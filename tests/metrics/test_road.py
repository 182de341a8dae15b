"""ROAD and normalised AOPC: imputation against a dense solution and Quantus, limits against all orders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustexplain.errors import InputError
from robustexplain.metrics import AOPC, ROAD, NormalisedAOPC, road
from robustexplain.metrics.imputation import NEIGHBOURS, imputed


class Weighted(nn.Module):
    """Two classes; the first one's logit is ``factor`` times a weighted sum of pixels."""

    def __init__(self, weights: Tensor, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        score = self.factor * (x * self.weights).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


class Pairs(nn.Module):
    """Regions act together: the first class's logit multiplies the halves of the image."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (x[..., i : i + 2, j : j + 2].flatten(1).sum(1) for i in (0, 2) for j in (0, 2))
        score = a * b + 2 * c - a * d
        return torch.stack([score, -score], 1)


def images(batch: int, side: int, channels: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return 0.1 + 0.9 * torch.rand(batch, channels, side, side, generator=rng, dtype=torch.float64)


@pytest.fixture
def target() -> Tensor:
    return torch.zeros(3, dtype=torch.int64)


def solved(image: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """The same by a dense system, pixel by pixel."""
    side, unknown = len(image), [tuple(p) for p in np.argwhere(missing)]
    system, right = np.zeros((len(unknown), len(unknown))), np.zeros(len(unknown))
    for at, (r, c) in enumerate(unknown):
        for i, j in itertools.product((-1, 0, 1), repeat=2):
            weight, p = NEIGHBOURS[i + 1][j + 1], (r + i, c + j)
            if 0 <= p[0] < side and 0 <= p[1] < side:
                system[at, at] += weight
                if missing[p]:
                    system[at, unknown.index(p)] -= weight
                else:
                    right[at] += weight * image[p]
    filled = image.copy()
    filled[missing] = np.linalg.solve(system, right)
    return filled


def test_imputation_against_a_dense_system_and_quantus() -> None:
    x = images(2, 10, 2)
    missing = torch.rand(2, 10, 10, generator=torch.Generator().manual_seed(1)) < 0.7
    missing[1] = False
    missing[1, 1:10, 2:9] = True
    found = imputed(x, missing)
    for i, channel in itertools.product(range(2), range(2)):
        wanted = solved(x[i, channel].numpy(), missing[i].numpy())
        np.testing.assert_allclose(found[i, channel], wanted, atol=1e-3)
    perturb = pytest.importorskip("quantus.functions.perturb_func")
    wanted = perturb.noisy_linear_imputation(x[0].numpy().copy(), np.flatnonzero(missing[0]), noise=0.0)
    np.testing.assert_allclose(found[0], wanted, atol=1e-3)
    torch.testing.assert_close(imputed(x[1:], missing[1:]), found[1:])


def test_imputation_keeps_a_flat_image_and_what_is_not_missing() -> None:
    flat = torch.full((1, 3, 8, 8), 0.3)
    missing = torch.ones(1, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(imputed(flat, missing), flat)
    missing[0, 2, 2] = False
    torch.testing.assert_close(imputed(flat, missing), flat, atol=1e-5, rtol=0)
    x = images(1, 8)
    assert imputed(x, missing)[0, 0, 2, 2] == x[0, 0, 2, 2]
    assert float(imputed(x, missing).std()) < 1e-3


def test_road_of_a_model_of_one_dot_by_hand(target: Tensor) -> None:
    """On a grey image with one bright dot, removing the dot takes all of what the model looks at."""
    weights = torch.zeros(1, 10, 10).double()
    weights[0, 4, 5] = 1
    x = torch.full((3, 1, 10, 10), 0.2).double()
    x[:, 0, 4, 5] = 0.9
    maps = weights.expand(3, 10, 10)
    metric = ROAD(of="logit", shares=(0.02, 0.1), noise=0.0)
    assert metric(Weighted(weights).eval(), x, maps, target).tolist() == pytest.approx([0.7] * 3, abs=1e-4)
    assert metric(Weighted(weights).eval(), x, -maps, target).tolist() == pytest.approx([-0.7] * 3, abs=1e-4)
    most, least = metric.curves(Weighted(weights).eval(), x, maps, target)
    torch.testing.assert_close(most, torch.full((3, 2), 0.2).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(least, torch.full((3, 2), 0.9).double(), atol=1e-4, rtol=0)
    assert ROAD(noise=0.1)(Weighted(weights).eval(), x, maps, target).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_pixels_are_solved_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    solved_in: list[torch.dtype] = []

    def noted(x: Tensor, missing: Tensor) -> Tensor:
        solved_in.append(x.dtype)
        return imputed(x, missing)

    monkeypatch.setattr(road, "imputed", noted)
    x = images(2, 10).to(dtype)
    metric = ROAD(of="logit", shares=(0.5,), noise=0.0)
    model = Weighted(torch.ones(1, 10, 10).to(dtype)).eval()
    metric(model, x, x.float().mean(1), torch.zeros(2, dtype=torch.int64))
    assert solved_in == [torch.float32] * 2


def test_removed_pixels_stay_in_range() -> None:
    seen: list[Tensor] = []
    model = Weighted(torch.ones(1, 8, 8).double()).eval()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ROAD(noise=2.0, shares=(0.5,))(model, images(2, 8), torch.rand(2, 8, 8).double())
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in seen)


# Normalised AOPC


def all_orders(model: nn.Module, x: Tensor, replaced: float) -> list[float]:
    """The sum of the falls along each of the 24 orders of four quarters."""
    totals = []
    with torch.no_grad():
        for order in itertools.permutations(range(4)):
            shown, total = x.clone(), 0.0
            for region in order:
                i, j = divmod(region, 2)
                shown[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = replaced
                total += float(model(x)[0, 0] - model(shown)[0, 0])
            totals.append(total)
    return totals


def test_the_limits_are_those_of_all_orders() -> None:
    x, model = images(3, 4), Pairs().eval()
    maps = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    metric = NormalisedAOPC(of="logit", side=2, beam=6, replacement="zero")
    target = torch.zeros(3, dtype=torch.int64)
    found = metric(model, x, maps, target)
    plain = AOPC(of="logit", patch=2, replacement="zero")(model, x, maps, target) * 5
    for i in range(3):
        totals = all_orders(model, x[i : i + 1], 0.0)
        low, high = min(totals), max(totals)
        assert found[i].item() == pytest.approx((plain[i].item() - low) / (high - low), abs=1e-9)


def test_exact_maps_of_additive_models_are_one_whatever_their_scale(target: Tensor) -> None:
    weights = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    x = images(3, 8)
    exact = (x * weights)[:, 0]
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    metric = NormalisedAOPC(of="logit", replacement="zero")
    models = [Weighted(weights, factor).eval() for factor in (1.0, 5.0)]
    for model in models:
        assert metric(model, x, exact, target).tolist() == pytest.approx([1.0] * 3)
        assert metric(model, x, -exact, target).tolist() == pytest.approx([0.0] * 3)
    one, five = (metric(model, x, noise, target) for model in models)
    torch.testing.assert_close(one, five)
    falls = [AOPC(of="logit", patch=2, replacement="zero")(model, x, noise, target) for model in models]
    torch.testing.assert_close(falls[1], 5 * falls[0])


def test_a_model_that_uses_nothing_has_no_figure(target: Tensor) -> None:
    model = Weighted(torch.zeros(1, 8, 8).double()).eval()
    assert NormalisedAOPC()(model, images(3, 8), torch.rand(3, 8, 8).double(), target).isnan().all()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"ROAD\.shares must be shares in \(0, 1\)"):
        ROAD(shares=(0.5, 1.0))
    with pytest.raises(InputError, match="positions of pixels"):
        ROAD()(nn.Linear(5, 2).eval(), torch.rand(2, 5), torch.rand(2, 5))
