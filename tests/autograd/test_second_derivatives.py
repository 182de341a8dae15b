"""Second derivatives that torch lacks: equal values, and derivatives that finite differences confirm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.attacks import ADV2, PGD
from robustexplain.autograd.second_derivatives import named_derivatives, twice_differentiable
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import Gradient, Smoothed
from robustexplain.system import System

Layer = Callable[[Tensor], Any]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return make().double().eval().requires_grad_(False)


def attended(x: Tensor, **options: Any) -> Tensor:
    q = x.flatten(2).mT[:, None]
    return F.scaled_dot_product_attention(q, q.sin(), q.cos(), **options)


MASK = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.4
MASK[3] = False
HEADS = seeded(lambda: nn.MultiheadAttention(4, 2, batch_first=True))
ENCODER = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
# Every activation of torch.nn that needs no argument, and what else models are made of.
LAYERS: dict[str, Layer] = {
    **{
        name: getattr(nn, name)().double().eval()
        for name in nn.modules.activation.__all__
        if name not in ("MultiheadAttention", "Threshold", "Softmax", "Softmin", "LogSoftmax")
    },
    "Softmax": nn.Softmax(1),
    "Softmin": nn.Softmin(1),
    "LogSoftmax": nn.LogSoftmax(1),
    "Threshold": nn.Threshold(0.1, 0.2),
    "GELU tanh": nn.GELU("tanh"),
    "Hardswish in place": lambda x: nn.Hardswish(inplace=True)(x * 1.5),
    "Hardsigmoid in place": lambda x: nn.Hardsigmoid(inplace=True)(x * 1.5),
    "LayerNorm": seeded(lambda: nn.LayerNorm(4)),
    "GroupNorm": seeded(lambda: nn.GroupNorm(2, 4)),
    "InstanceNorm": seeded(lambda: nn.InstanceNorm2d(4, affine=True)),
    "BatchNorm": seeded(lambda: nn.BatchNorm2d(4)),
    "RMSNorm": seeded(lambda: nn.RMSNorm(4)),
    "LocalResponseNorm": nn.LocalResponseNorm(2),
    "MaxPool": nn.MaxPool2d(2),
    "AdaptiveAvgPool": nn.AdaptiveAvgPool2d(3),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, size=3, mode="bicubic", antialias=True),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1) / 4, align_corners=False),
    "ConvTranspose": seeded(lambda: nn.ConvTranspose2d(4, 2, 2)),
    "attention": attended,
    "attention, one query masked": lambda x: attended(x, attn_mask=MASK),
    "attention, added mask": lambda x: attended(x, attn_mask=MASK.double() - 0.5),
    "attention, causal": lambda x: attended(x, is_causal=True, scale=0.7),
    "attention, grouped": lambda x: F.scaled_dot_product_attention(x, x[:, :2].sin(), x[:, 2:].cos(), enable_gqa=True),
    "MultiheadAttention": lambda x: HEADS(*[x[:, 0]] * 3, need_weights=False)[0],
    "MultiheadAttention, masked": lambda x: HEADS(*[x[:, 0]] * 3, attn_mask=MASK[:4, :4].T, need_weights=False)[0],
    "TransformerEncoderLayer": lambda x: ENCODER(x[:, 0]),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_a_second_derivative(name: str, x: Tensor) -> None:
    def called(x: Tensor) -> Tensor:
        with twice_differentiable():
            found: Tensor = LAYERS[name](x)
        return found

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(called(leaf), LAYERS[name](x), rtol=1e-14, atol=1e-15)
    torch.autograd.gradcheck(called, leaf, fast_mode=True)
    torch.autograd.gradgradcheck(called, leaf, fast_mode=True)


@pytest.mark.parametrize("layer", [nn.Hardsigmoid(), nn.Hardswish()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_activations_are_torchs_own_to_the_last_digit(layer: nn.Module, dtype: torch.dtype) -> None:
    x = torch.linspace(-7, 7, 2001).to(dtype)
    with twice_differentiable():
        found = layer(x.clone().requires_grad_()).detach()
    error = (found.double() - layer(x).double()).abs()
    assert (error <= torch.finfo(dtype).eps * 4 * layer(x).double().abs().clamp(min=1e-3)).all()


def hard_net(gate: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(1, 6, 3, padding=1), gate, nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return seeded(lambda: nn.Sequential(*layers)).float()


@pytest.mark.parametrize("gate", [nn.Hardswish(), nn.Hardsigmoid(), nn.Hardswish(inplace=True)])
def test_gradient_maps_of_hard_activations_are_attacked(gate: nn.Module, grey: Tensor) -> None:
    net = hard_net(gate)
    system, y = System(net, Gradient(net)), net(grey).argmax(1)
    found = ADV2(0.1, steps=4, step_size=0.05, surrogate="none")(system, grey, y)
    assert not found.zero_direction.any()
    assert PGD(0.1, 2, 0.05)(system, grey, y).x.isfinite().all()


def test_fused_attention_is_attacked(tiny_vit: nn.Module, grey: Tensor) -> None:
    import copy

    net = copy.deepcopy(tiny_vit)
    for block in net.net.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = True
    x = grey.clone().requires_grad_()
    fused, plain = (torch.autograd.grad(Gradient(model)(x).sum(), x)[0] for model in (net, tiny_vit))
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-6)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Applied(nn.Module):
    def __init__(self, function: Layer) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.function(x).flatten(1)[:, :4].softmax(1)
        return logits


def deformed(x: Tensor) -> Tensor:
    ops = pytest.importorskip("torchvision.ops")
    found: Tensor = ops.deform_conv2d(x, x.repeat(1, 2, 1, 1) * 0.3, x.new_ones(4, 1, 1, 1))
    return found


@pytest.mark.parametrize(
    ("function", "operation"), [(Once.apply, "once_differentiable"), (deformed, "double backward")]
)
def test_an_operation_without_second_derivative_is_named(function: Layer, operation: str, grey: Tensor) -> None:
    net = Applied(function).eval()
    system, y = System(net, Gradient(net)), net(grey).argmax(1)
    with pytest.raises(UnsupportedModelError, match=operation):
        ADV2(0.1, steps=2, step_size=0.05, surrogate="none")(system, grey, y)


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="size of tensor") as caught, named_derivatives():
        torch.ones(2) + torch.ones(3)
    assert not isinstance(caught.value, UnsupportedModelError)


@pytest.mark.filterwarnings("ignore::robustexplain.errors.PartlySmoothedWarning")
def test_rectifiers_alone_are_smoothed(grey: Tensor) -> None:
    # A hard swish is no rectifier, although it is computed by a clamp.
    net = nn.Sequential(hard_net(nn.Hardswish())[0], nn.Hardswish(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = Smoothed(net.eval(), Gradient(net))(grey.clone().requires_grad_())
    with torch.no_grad():
        wanted = Smoothed(net, Gradient(net))(grey)
    torch.testing.assert_close(found.detach(), wanted)
