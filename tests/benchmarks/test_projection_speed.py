"""A projected gradient beside the plain one, and RelEx beside the passes that it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustexplain import models
from robustexplain.interpreters import Gradient, Projected, Reference, RelEx
from tests.benchmarks.test_interpreter_speed import least, without_gradient

SAMPLES, STEPS = 4, 8


@pytest.fixture
def model() -> nn.Module:
    return models.build("small-resnet", num_classes=10, in_channels=1, seed=0).eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark
def test_a_projection_costs_less_than_the_gradient(model: nn.Module, x: Tensor) -> None:
    bank = torch.rand(4000, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = Gradient(model)
    projected = Projected(model, plain, Reference(bank))
    times = least({"ours": without_gradient(lambda: projected(x)), "floor": without_gradient(lambda: plain(x))}, 11)
    ratio = times["ours"] / times["floor"]
    print(f"\nprojected gradient, bank of 4000: {1e3 * times['ours']:.1f} ms, plain {1e3 * times['floor']:.1f} ms, "
          f"ratio {ratio:.2f}")  # fmt: skip
    assert ratio < 2


@pytest.mark.benchmark
def test_relex_costs_its_passes(model: nn.Module, x: Tensor) -> None:
    relex = RelEx(model, samples=SAMPLES, steps=STEPS, batch_size=128)
    points, classes = x.repeat(2 * SAMPLES, 1, 1, 1), torch.zeros(2 * SAMPLES * len(x), 1, dtype=torch.long)

    def passes() -> None:
        for _ in range(STEPS):
            leaf = points.clone().requires_grad_()
            torch.autograd.grad(model(leaf).gather(1, classes).sum(), leaf)

    times = least({"ours": without_gradient(lambda: relex(x)), "floor": passes}, 3, 1)
    ratio = times["ours"] / times["floor"]
    print(f"\nRelEx: {1e3 * times['ours']:.1f} ms, its passes {1e3 * times['floor']:.1f} ms, ratio {ratio:.2f}")
    assert ratio < 1.2
