"""Certified maps against as many maps in batches: votes and tests must cost next to nothing."""

from __future__ import annotations

import time

import pytest
import torch

from robustexplain import models
from robustexplain.interpreters import Certified, GradCAM, MeTFA, Sparsified
from robustexplain.interpreters.base import Interpreter
from tests.benchmarks.test_interpreter_speed import Run, least


@pytest.mark.benchmark
@pytest.mark.parametrize("side", [32, 64])
def test_a_hundred_draws_cost_a_hundred_maps_in_batches(side: int) -> None:
    model = models.build("small-resnet", num_classes=10, in_channels=3).eval().requires_grad_(False)
    base = GradCAM(model)
    x = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    copies = x.repeat(16, 1, 1, 1)
    target = torch.tensor([0, 3, 6, 9])

    def maps() -> None:
        with torch.no_grad():
            model(x)
            for start in range(0, 100, 16):
                size = 4 * min(16, 100 - start)
                base.explain(copies[:size], target.repeat(16)[:size])

    def explained(method: Interpreter) -> object:
        def run() -> None:
            with torch.no_grad():
                method.explain(x, target)

        return run

    runs: dict[str, Run] = {
        "maps": maps,
        "certified": explained(Certified(model, base)),
        "sparsified": explained(Sparsified(model, base, samples=100, sigma=0.2, grid=8)),
        "metfa": explained(MeTFA(model, base, samples=100)),
    }
    found = least(runs, 5, row=1, clock=time.process_time)
    print("\n" + ", ".join(f"{n} {1e3 * t:.0f} ms ({t / found['maps']:.2f}x)" for n, t in found.items()))
    assert found["certified"] < 1.1 * found["maps"]
    assert found["sparsified"] < 1.1 * found["maps"]
