"""Layers with fixed weights: torch's own values and derivatives, and nothing spent on the weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from robustexplain.autograd.fixed_weights import fixed_weights
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.interpreters import Gradient, Mask


class Calls(TorchDispatchMode):
    """The names of the operations that reach the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def convolution(*channels: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(*channels, 3, **options).double().requires_grad_(False)  # type: ignore[arg-type]


def norm(layer: nn.Module, channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layer.running_mean.copy_(torch.randn(channels))  # type: ignore[union-attr, operator]
    layer.running_var.copy_(torch.rand(channels) + 0.5)  # type: ignore[union-attr, operator]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double().eval().requires_grad_(False)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: convolution(4, 6), (2, 4, 7, 6)),
    "no bias": (lambda: convolution(4, 6, bias=False), (2, 4, 7, 6)),
    "stride that leaves a border over": (lambda: convolution(4, 6, stride=(2, 3), padding=1), (2, 4, 8, 9)),
    "dilation": (lambda: convolution(4, 2, dilation=2, padding=(2, 1)), (2, 4, 7, 7)),
    "groups": (lambda: convolution(4, 6, groups=2), (2, 4, 6, 6)),
    "depthwise": (lambda: convolution(4, 8, groups=4, stride=2), (2, 4, 6, 6)),
    "padding='same', which stays torch's": (lambda: convolution(4, 6, padding="same"), (2, 4, 6, 6)),
    "circular": (lambda: convolution(4, 6, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "one image without a batch": (lambda: convolution(4, 6), (4, 6, 6)),
    "batch norm": (lambda: norm(nn.BatchNorm2d(4)), (2, 4, 3, 3)),
    "batch norm with an eps of its own": (lambda: norm(nn.BatchNorm2d(4, eps=0.3)), (2, 4, 3, 3)),
    "batch norm, not affine": (lambda: norm(nn.BatchNorm2d(4, affine=False)), (2, 4, 3, 3)),
    "batch norm of rows": (lambda: norm(nn.BatchNorm1d(4)), (3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_torchs_own_to_the_bit_and_so_are_derivatives_but_for_rounding(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for block in (nullcontext(), fixed_weights()):
        with block:
            y = layer(x).square()
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
            (third,) = torch.autograd.grad(second.pow(2).sum(), x)
        found.append((y, first, second, third))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for theirs, ours in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        with fixed_weights():
            y: Tensor = layer(x).tanh()
            return y

    assert gradcheck(function, (x,), fast_mode=True)
    assert gradgradcheck(function, (x,), fast_mode=True)


def test_weights_that_need_a_gradient_get_it() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Softplus()).eval()
    x, found = torch.rand(2, 2, 6, 6, requires_grad=True), []
    for block in (nullcontext(), fixed_weights()):
        with block:
            (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None and ours is None) or torch.equal(theirs, ours)


def test_a_bias_alone_that_is_trained_is_seen() -> None:
    layer = convolution(4, 6)
    layer.bias.requires_grad_()  # type: ignore[operator, union-attr]
    with fixed_weights():
        layer(torch.rand(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert layer.bias.grad is not None


def test_a_batch_norm_in_train_mode_stays_torchs() -> None:
    layer = norm(nn.BatchNorm2d(4)).train()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    before = layer.running_mean.clone()  # type: ignore[operator, union-attr]
    with fixed_weights():
        (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    assert not torch.equal(layer.running_mean, before)  # type: ignore[arg-type]
    (theirs,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("make", [lambda: convolution(4, 6), lambda: norm(nn.BatchNorm2d(4))], ids=["conv", "norm"])
def test_weights_written_over_before_the_way_back_are_noticed(make: Callable[[], nn.Module]) -> None:
    layer = make()
    with fixed_weights():
        y = layer(torch.rand(2, 4, 6, 6, dtype=torch.float64, requires_grad=True))
    layer.weight.zero_()  # type: ignore[operator, union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("make", [lambda: convolution(4, 6), lambda: norm(nn.BatchNorm2d(4))], ids=["conv", "norm"])
def test_autocast_keeps_its_own_precision(make: Callable[[], nn.Module]) -> None:
    layer, x, found = make().float(), torch.rand(2, 4, 6, 6, requires_grad=True), []
    for block in (nullcontext(), fixed_weights()):
        with torch.autocast("cpu", torch.bfloat16), block:
            y = layer(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for theirs, ours in zip(*found, strict=True):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)


def test_a_batch_norm_that_keeps_its_statistics_in_another_precision_is_torchs_own() -> None:
    layer = norm(nn.BatchNorm2d(4)).float()
    x = torch.rand(2, 4, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    with fixed_weights():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(gradient, theirs)


def test_the_block_ends_with_an_exception() -> None:
    layer, x = convolution(4, 6), torch.rand(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(KeyError), fixed_weights():
        raise KeyError
    assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"


def test_nothing_is_spent_where_nothing_is_differentiated() -> None:
    layer, x = convolution(4, 6), torch.rand(2, 4, 6, 6, dtype=torch.float64)
    with fixed_weights():
        assert layer(x).grad_fn is None
        with torch.no_grad():
            assert layer(x.requires_grad_()).grad_fn is None


@pytest.fixture(scope="module")
def depthwise() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("efficientnet_lite0", num_classes=5).eval().requires_grad_(False)


def test_a_map_of_depthwise_convolutions_is_differentiated_without_a_loop_over_groups(depthwise: nn.Module) -> None:
    layers = sum(isinstance(layer, nn.Conv2d) for layer in depthwise.modules())
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    with swapped(Softplus(10.0)):
        maps = Gradient(depthwise)(x)
    with Calls() as seen:
        torch.autograd.grad(maps.sum(), x)
    # Along the gradient's own graph, and then back along the forward pass.
    assert seen.names.count("convolution") == layers
    assert seen.names.count("convolution_backward") <= 2 * layers
    # Torch's own takes its kernel once, and a formula of many operations for the other.
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in depthwise.modules())
    assert seen.names.count("native_batch_norm_backward") == 2 * norms


def test_a_step_of_mask_is_differentiated_without_a_loop_over_groups(depthwise: nn.Module) -> None:
    layers = sum(isinstance(layer, nn.Conv2d) for layer in depthwise.modules())
    mask, x = Mask(depthwise, size=8), torch.rand(1, 3, 32, 32, requires_grad=True)
    with swapped(Softplus(10.0)):
        state = mask.step(x, mask.background(x), mask.begin(x), torch.tensor([1]), graph=True)
    with Calls() as seen:
        torch.autograd.grad(state.mask.sum(), x)
    # One more for the blur's two convolutions.
    assert seen.names.count("convolution") <= layers + 2


def test_a_map_and_its_derivative_are_those_of_torchs_own_layers(depthwise: nn.Module) -> None:
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    net, found = depthwise.double(), []
    for weights_need in (True, False):
        net.requires_grad_(weights_need)
        z = x.clone().requires_grad_()
        with swapped(Softplus(10.0)):
            maps = Gradient(net)(z)
            (derivative,) = torch.autograd.grad(maps.square().sum(), z)
        found.append((maps.detach(), derivative))
    net.float()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-7, atol=float(found[0][1].abs().max()) * 1e-9)


def test_padding_by_keyword_and_by_place_is_the_same() -> None:
    weight, x = torch.rand(3, 2, 3, 3), torch.rand(1, 2, 5, 5, requires_grad=True)
    with fixed_weights():
        by_place = F.conv2d(x, weight, None, 1, 1)
        by_name = F.conv2d(input=x, weight=weight, padding=1)
    assert torch.equal(by_place, by_name)
    assert by_place.shape[-1] == 5
