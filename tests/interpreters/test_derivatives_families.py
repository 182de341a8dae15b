"""Derivatives of every registered interpreter, by the input and by the weights, on several families of networks.

The conformance test proves them on a tiny network; this one on the layers that real ones are made of: residual
additions, batch norm, depthwise convolutions, squeezes, attention. An interpreter that refuses a family is skipped.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from robustexplain import models
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import Gradient, Interpreter


@cache
def conformance() -> ModuleType:
    """The conformance test's module, which knows how each interpreter is made for a test."""
    path = Path(__file__).with_name("test_conformance.py")
    spec = importlib.util.spec_from_file_location("conformance_makers", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_cnn() -> nn.Module:
    return models.build("small-cnn", num_classes=4, in_channels=3, seed=1)


def resnet() -> nn.Module:
    """torchvision's ResNet-18 at an eighth of its width."""
    net = torchvision.models.resnet18()
    net.inplanes = 8
    net.conv1, net.bn1, net.fc = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(64, 4)
    for i in range(4):
        block = torchvision.models.resnet.BasicBlock
        setattr(net, f"layer{i + 1}", net._make_layer(block, 8 * 2**i, 2, stride=1 if i == 0 else 2))
    # Where a maximum changes hands a gradient jumps, and finite differences measure the jump.
    net.maxpool = nn.AvgPool2d(3, 2, 1)
    return net


def lite() -> nn.Module:
    """timm's EfficientNet-Lite with fewer and narrower blocks: the same classes of layers."""
    stages = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e6_c12"], ["ir_r2_k5_s2_e6_c16"]]
    return timm.models.efficientnet.EfficientNet(
        timm.models._efficientnet_builder.decode_arch_def(stages),
        num_classes=4,
        num_features=32,
        stem_size=8,
        fix_stem=True,
        act_layer=nn.ReLU6,
    )


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "small-cnn": small_cnn,
    "resnet18": resnet,
    "efficientnet_lite0": lite,
    "vit_tiny": vit,
}


@cache
def built(family: str) -> nn.Module:
    """A network of that family in float64, with statistics and weights that make its classes differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = FAMILIES[family]()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.3)
    return net.double().eval()


@pytest.fixture
def x() -> Tensor:
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.1 + 0.8 * torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


@pytest.fixture
def smooth() -> Iterator[None]:
    with swapped(Softplus(4.0)):
        yield


def direction(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_derivative_agrees_with_finite_differences(family: str, smooth: None, x: Tensor) -> None:
    net, target, v = built(family), torch.tensor([1, 3]), direction(x, 2)
    maps = Gradient(net, of="logit", channels="sum")(x, target)
    v = v[:, :1].expand_as(v)

    def value(t: float) -> float:
        with torch.no_grad():
            return float(net(x + t * v).gather(1, target[:, None]).sum())

    slope = float((maps * v[:, 0]).detach().sum())
    assert slope == pytest.approx(conformance().central(value, 1e-4), rel=1e-6)


# Kept short: some interpreters take many passes, and every pass is one of a whole network in float64.
NAMES = conformance().DIFFERENTIABLE


def made(name: str, net: nn.Module, x: Tensor, target: Tensor) -> tuple[Interpreter, Tensor]:
    """The interpreter without kinks of its own, and its maps; skips what it refuses."""
    try:
        interpreter = conformance().smooth(name)(net, x)
        return interpreter, interpreter(x, target)
    except UnsupportedModelError as error:
        pytest.skip(f"refused: {error}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_maps_agree_with_finite_differences(name: str, family: str, smooth: None, x: Tensor) -> None:
    net, target = copy.deepcopy(built(family)), torch.tensor([1, 3])
    interpreter, _ = made(name, net, x, target)
    parameters = conformance().weights(interpreter)
    x = x.clone().requires_grad_()
    maps = interpreter(x, target)
    weight = direction(maps, 5) / float(maps.detach().abs().mean())
    ways = [x, *parameters]
    steps = [
        direction(p.detach(), i) * (1 if i == 0 else float(p.detach().std(correction=0)) or 0.1)
        for i, p in enumerate(ways)
    ]
    gradients = torch.autograd.grad((maps * weight).sum(), ways, allow_unused=True)
    start = [p.detach().clone() for p in ways]

    def value(moved: list[int]) -> Callable[[float], float]:
        def at(t: float) -> float:
            with torch.no_grad():
                for i in moved:
                    ways[i].copy_(start[i] + t * steps[i])
                found = float((interpreter.explain(ways[0].detach(), target).maps * weight).sum())
                for i in moved:
                    ways[i].copy_(start[i])
            return found

        return at

    def slope(moved: list[int]) -> float:
        pairs: list[tuple[Any, Tensor]] = [(gradients[i], steps[i]) for i in moved]
        return sum(float((g * v).sum()) for g, v in pairs if g is not None)

    for moved in ([0], list(range(1, len(ways)))):
        wanted = conformance().central(value(moved), conformance().STEPS.get(name, 1e-5))
        assert slope(moved) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        assert abs(wanted) > 1e-4
