"""What an attack step costs, counted: the model's own passes are the floor, and memory does not grow with steps."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ADV2, PGD, Attack
from robustexplain.interpreters import CAM, GradCAM, Gradient, Interpreter
from robustexplain.models import admit


class _Gate(torch.autograd.Function):
    """The identity, which counts how often it is passed forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, counts: Counter[str]) -> Tensor:
        ctx.name, ctx.counts = name, counts
        counts[f"{name} forward"] += 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.counts[f"{ctx.name} backward"] += 1
        return grads[0], None, None


class Counting(nn.Module):
    """A net with a gate at its input, one before its last convolution, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = _Gate.apply(x, "input", self.counts)
        x = self.first(x).relu()
        x = _Gate.apply(x, "early", self.counts)
        x = self.last(x)
        x = _Gate.apply(x, "head", self.counts)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture
def net() -> Counting:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Counting()
    with torch.no_grad():
        model.head.weight.mul_(20)
    # A model is tried once, when it is first seen; what is counted comes after.
    admit(model.eval(), torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(1)))
    return model


def run(net: Counting, interpreter: Callable[[nn.Module], Interpreter], attack: Attack) -> None:
    x = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    attack(rx.System(net, interpreter(net)), x, y, (y + 1) % 4)


def cost(net: Counting, interpreter: Callable[[nn.Module], Interpreter], attack: PGD | ADV2) -> dict[str, float]:
    """Passes a step, as the difference of two runs: what is done once drops out."""
    found = []
    for steps in (12, 22):
        net.counts.clear()
        run(net, interpreter, replace(attack, steps=steps))
        found.append(Counter(net.counts))
    return {key: (found[1][key] - found[0][key]) / 10 for key in found[1]}


ONE_EACH = {f"{gate} {way}": 1.0 for gate in ("input", "early", "head") for way in ("forward", "backward")}
# Signed, since a Grad-CAM map of this random net may be negative everywhere, and ReLU would leave nothing of it.
SIGNED = partial(GradCAM, relu=False)
JOINT = ADV2(eps=0.1, step_size=0.01, warm_start=0.0)


def test_a_step_of_pgd_is_one_forward_and_one_backward(net: Counting) -> None:
    assert cost(net, CAM, PGD(0.1)) == ONE_EACH


def test_a_step_of_adv2_on_cam_costs_no_more_than_one_of_pgd(net: Counting) -> None:
    assert cost(net, CAM, JOINT) == ONE_EACH


def test_a_step_of_adv2_on_gradcam_goes_back_to_the_layer_once_more_and_no_further(net: Counting) -> None:
    assert cost(net, SIGNED, JOINT) == {**ONE_EACH, "head backward": 2.0}


def test_a_step_of_adv2_on_gradient_maps_is_one_forward_and_two_backwards(net: Counting) -> None:
    expected = {key: 2.0 if "backward" in key else 1.0 for key in ONE_EACH}
    assert cost(net, Gradient, replace(JOINT, surrogate="none")) == expected


@contextmanager
def saved_tensors() -> Iterator[Counter[str]]:
    """The tensors that autograd holds for backward passes: how many now, and at most."""
    counts: Counter[str] = Counter()

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            # Detached, or an output that is saved would keep its own graph alive.
            self.tensor = tensor.detach()
            counts["now"] += 1
            counts["peak"] = max(counts["peak"], counts["now"])

        def __del__(self) -> None:
            counts["now"] -= 1

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield counts


@pytest.mark.parametrize("interpreter", [CAM, SIGNED, Gradient], ids=["cam", "gradcam", "gradient"])
def test_memory_does_not_grow_with_steps(net: Counting, interpreter: Callable[[nn.Module], Interpreter]) -> None:
    attack = ADV2(eps=0.1, step_size=0.01, surrogate="none")
    run(net, interpreter, replace(attack, steps=3))
    peaks, alive = [], []
    for steps in (30, 300):
        calls, most = 0, 0

        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal calls, most
            calls += 1
            if calls == steps:  # noqa: B023
                most = sum(type(o) is Tensor for o in gc.get_objects())

        gc.collect()
        handle = net.register_forward_hook(look)
        with saved_tensors() as counts:
            run(net, interpreter, replace(attack, steps=steps))
        handle.remove()
        gc.collect()
        peaks.append(counts["peak"])
        alive.append(most)
    assert 0 < peaks[1] <= peaks[0]
    assert 0 < alive[1] <= alive[0] + 5
