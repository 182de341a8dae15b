"""The tape sees what a model does, changes nothing, and finds the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.autograd.tape import Call, Tape, record
from robustexplain.errors import UnknownNameError, UnsupportedModelError


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval().double()


def image(batch: int = 2, side: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ordinary(tape: Tape, seed: Tensor, graph: bool = False) -> Tensor:
    return tape.backward(seed, lambda step, at: list(step.vjp(at, graph)))


class Odd(nn.Module):
    """In-place, reused, functional and split operations in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.first, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.act, self.head = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25
        x = self.act(self.norm(self.first(x)))
        identity = x
        out = self.twice(x)
        F.relu_(out)
        out = self.twice(out)
        out += identity
        out = F.hardtanh(out, 0.0, 6.0)
        a, b = out.chunk(2, dim=1)
        out = torch.cat([b, a.clamp(min=0)], 1)
        out = out + out
        return self.head(F.max_pool2d(out, 2).mean((2, 3)))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "odd": Odd,
    "torchvision resnet18": lambda: torchvision.models.resnet18(weights=None, num_classes=5),
    "torchvision densenet121": lambda: torchvision.models.densenet121(weights=None, num_classes=5),
    "timm efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0", num_classes=5),
    "timm test_vit": lambda: timm.create_model("test_vit", num_classes=5, img_size=32),
    "torchvision squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=5),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_is_the_models_own_and_the_way_back_is_autograds(family: str) -> None:
    model, x = seeded(FAMILIES[family]), image().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = model(x)
        tape = record(model, x)
    # Fused attention is computed step by step, to the same result up to rounding.
    torch.testing.assert_close(tape.logits, wanted, rtol=1e-12, atol=1e-12)
    seed = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(wanted, x, seed)
    torch.testing.assert_close(ordinary(tape, seed), gradient, rtol=1e-9, atol=1e-12 * float(gradient.abs().max()))


def test_the_way_back_is_differentiable_in_input_and_weights() -> None:
    model, x = seeded(Odd), image(1, 8).requires_grad_()
    with swapped(Softplus(3.0)):
        tape = record(model, x)
        seed = torch.ones_like(tape.logits)
        found = ordinary(tape, seed, graph=True).square().sum()
        (gradient,) = torch.autograd.grad(model(x), x, seed, create_graph=True)
        wanted = gradient.square().sum()
    for value in (x, model.first.weight, model.twice.weight, model.norm.weight, model.norm.bias):
        a, b = (torch.autograd.grad(total, value, retain_graph=True)[0] for total in (found, wanted))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_it_names_what_every_step_does() -> None:
    tape = record(seeded(Odd), image().requires_grad_())
    assert [step.kind for step in tape.steps[1:]] == [
        "affine", "affine", "linear", "batch_norm", "activation", "linear", "activation", "linear", "sum",
        "activation", "shape", "activation", "shape", "sum", "max_pool", "average", "linear",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (lambda x: 2 - x, "affine"),
        (lambda x: x / 3, "affine"),
        (lambda x: torch.ones(3, 1, 1).double() * x, "affine"),
        (lambda x: -x, "affine"),
        (lambda x: 1 / (x + 1), "unknown"),
        (lambda x: x * x, "unknown"),
        (lambda x: x**2, "unknown"),
        (lambda x: x - x.flip(1), "sum"),
        (lambda x: F.gelu(x), "activation"),
        (lambda x: F.silu(x, inplace=False), "activation"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "unknown"),
    ],
)
def test_the_kind_of_a_step_is_what_it_does_to_its_values(operation: Callable[[Tensor], Tensor], kind: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operation(x).mean((2, 3))

    tape = record(Net().eval(), image().requires_grad_())
    assert tape.steps[-2].kind == kind


def test_values_that_are_overwritten_later_are_kept() -> None:
    tape = record(seeded(Odd), image().requires_grad_())
    (conv,) = [step for step in tape.steps if step.name == "conv2d" and step.index == 6]
    relu = tape.steps[7]
    assert relu.name == "relu"
    assert (conv.outputs[0] < 0).any()
    assert torch.equal(relu.sources[0].value, conv.outputs[0])
    assert torch.equal(relu.outputs[0], conv.outputs[0].clamp(min=0))


def test_a_layer_is_found_where_it_ran_and_is_a_place_to_stop() -> None:
    model, x = seeded(Odd), image().requires_grad_()
    tape = record(model, x, ["norm"])
    step, output = tape.layers["norm"]
    seed = torch.ones_like(tape.logits)
    found = tape.backward(seed, lambda s, at: list(s.vjp(at, False)), (step, output))
    (wanted,) = torch.autograd.grad(tape.logits, step.outputs[output], seed)
    torch.testing.assert_close(found, wanted)


def test_a_wrong_layer_is_named() -> None:
    model = seeded(Odd)
    with pytest.raises(UnknownNameError, match="did you mean 'first'"):
        record(model, image().requires_grad_(), ["firts"])
    model.idle = nn.Conv2d(3, 3, 1)
    with pytest.raises(UnsupportedModelError, match="'idle' does not run"):
        record(model, image().requires_grad_(), ["idle"])


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class WithHidden(nn.Module):
    """A residual branch that runs out of sight, or everything."""

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self.everything, self.head = everything, nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        branch = Hidden.apply(x)
        return self.head((branch if self.everything else x + branch).mean((2, 3)))


@pytest.mark.parametrize("everything", [True, False])
def test_what_runs_out_of_sight_is_refused(everything: bool) -> None:
    model, x = seeded(lambda: WithHidden(everything)), image().requires_grad_()
    with pytest.raises(UnsupportedModelError, match=r"hide theirs|unrecorded"):
        ordinary(record(model, x), torch.ones(2, 5, dtype=x.dtype))


def test_a_tensor_that_is_changed_after_its_use_is_refused() -> None:
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            total = y.mean((2, 3))
            y += 1
            return total + y.mean((2, 3))

    with pytest.raises(UnsupportedModelError, match="changed in place later"):
        ordinary(record(Careless().eval(), image().requires_grad_()), torch.ones(2, 3, dtype=torch.float64))


def test_a_tensor_that_is_changed_through_a_view_is_refused() -> None:
    class Sly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.flatten(1).relu_()
            return y.mean((2, 3))

    with pytest.raises(UnsupportedModelError, match="through a view"):
        record(Sly().eval(), image().requires_grad_())


def test_hooks_are_gone_after_an_exception() -> None:
    class Broken(Odd):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("out of luck")

    model = seeded(Broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        record(model, image().requires_grad_(), ["norm"])
    assert not model.norm._forward_hooks
    assert isinstance(torch.relu(torch.ones(1)), Tensor)


def test_a_rule_may_stop_a_path() -> None:
    model, x = seeded(Odd), image().requires_grad_()
    tape = record(model, x)

    def no_residual(step: Call, at: list[Tensor]) -> list[Tensor | None]:
        found: list[Tensor | None] = list(step.vjp(at, False))
        return [found[0], None] if step.index == residual.index else found

    (residual,) = [
        step for step in tape.steps if step.kind == "sum" and step.sources[0].step is not step.sources[1].step
    ]
    seed = torch.ones_like(tape.logits)
    difference = tape.backward(seed, no_residual) - ordinary(tape, seed)
    assert float(difference.abs().max()) > 1e-4


def test_constants_that_take_after_an_activation_are_no_part_of_the_way() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.shift.to(x)[:, None, None] + torch.zeros_like(x)
            return (y * (x > 0.5)).mean((2, 3))

    tape = record(Bias().eval(), image().requires_grad_())
    assert [step.kind for step in tape.steps[1:]] == ["affine", "affine", "affine", "average"]
