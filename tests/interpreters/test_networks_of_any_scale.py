"""Networks that compute the same with small or large activations, and their maps and metrics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustexplain.attacks import Dombrowski
from robustexplain.autograd.rectifiers import SmoothGradient, Softplus, count_rectifiers, swapped
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import CAM, LRP, DeepLIFT, GradCAM, GuidedBackprop, GuidedGradCAM
from robustexplain.metrics import NormalisedAOPC
from robustexplain.system import System


def seeded(build: Any, *given: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*given).eval()


class Deep(nn.Module):
    """Two convolutions and a linear layer; activations ``scale`` times as large, the logits the same."""

    def __init__(self, scale: float = 1.0, pool: str = "none") -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = pool, nn.Linear(8 if pool == "max" else 8 * 256, 5)
        with torch.no_grad():
            self.first.weight.mul_(scale)
            self.first.bias.mul_(scale)  # type: ignore[union-attr]
            self.second.bias.mul_(scale)  # type: ignore[union-attr]
            self.head.weight.div_(scale)

    def forward(self, x: Tensor) -> Tensor:
        found = self.second(self.first(x).relu()).relu()
        return self.head(found.amax((2, 3)) if self.pool == "max" else found.flatten(1))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e4])
def test_deeplift_is_complete_at_any_scale(scale: float, x: Tensor) -> None:
    net = seeded(Deep, scale)
    shown = DeepLIFT(net).explain(x)
    with torch.no_grad():
        classes = net(x).argmax(1, keepdim=True)
        expected = (net(x) - net(torch.zeros_like(x))).gather(1, classes)[:, 0]
    torch.testing.assert_close(shown.maps.sum((1, 2)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_head_on_maxima_is_no_head_on_averages_at_any_scale(scale: float, x: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="global average"):
        CAM(seeded(Deep, scale, "max"))(x)


class Normed(nn.Module):
    """A patch embedding of small activations and a norm by their root mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 8, 8, bias=False), nn.RMSNorm(8)
        self.head = nn.Linear(8, 5, bias=False)
        with torch.no_grad():
            self.embed.weight.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).flatten(2).mT).mean(1))


def test_lrp_loses_nothing_at_a_norm_with_its_own_epsilon(x: Tensor) -> None:
    net = seeded(Normed).double()
    shown = LRP(net, conv="epsilon", epsilon=1e-12).explain(x.double())
    torch.testing.assert_close(shown.maps.sum((1, 2)), shown.logits.amax(1), rtol=1e-4, atol=0)


class Small(nn.Module):
    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.net(x)


def test_normalised_aopc_is_that_of_the_same_network_with_tiny_logits(x: Tensor) -> None:
    net = seeded(Deep)
    maps, target = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 3])
    metric = NormalisedAOPC(of="logit")
    usual, tiny = (metric(Small(net, scale).eval(), x, maps, target) for scale in (1.0, 1e-5))
    assert bool(usual.isfinite().all())
    torch.testing.assert_close(usual, tiny, rtol=1e-3, atol=1e-3)


# --- rectifiers with a slope that is learned ---


def with_activation(make: Any) -> nn.Module:
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Identity(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)
        )
    )
    net[1] = make()
    return net.eval()


@pytest.mark.parametrize("make", [lambda: nn.PReLU(8), nn.PReLU, lambda: nn.RReLU(0.2, 0.3, inplace=True)])
def test_parametric_rectifiers_are_smoothed_guided_and_attacked_as_leaky_ones_are(make: Any, x: Tensor) -> None:
    leaky, other = with_activation(lambda: nn.LeakyReLU(0.25)), with_activation(make)
    assert count_rectifiers(other, x) == 1
    for smooth in (Softplus(5.0), SmoothGradient()):
        with torch.no_grad(), swapped(smooth):
            torch.testing.assert_close(leaky(x), other(x))
    torch.testing.assert_close(GuidedBackprop(leaky)(x), GuidedBackprop(other)(x))
    label, found = leaky(x).argmax(1), []
    for net in (leaky, other):
        system = System(net, GradCAM(net))
        made = Dombrowski(eps=0.1, steps=5)(system, x, label)
        found.append(made.x)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_slopes_of_channels_are_their_own(x: Tensor) -> None:
    net = with_activation(lambda: nn.PReLU(8))
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(-0.5, 0.5, 8))
        exact = net(x)
        with swapped(lambda z: z.clamp(min=0)):
            torch.testing.assert_close(net(x), exact)


def test_guided_gradcam_of_an_image_is_the_same_whatever_was_explained_before() -> None:
    """Of a small image the last grid has one pixel, and another layer is the last with a grid."""
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 3),
        )
    )  # fmt: skip
    large, small = (torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(2)) for side in (64, 16))
    kept = GuidedGradCAM(net, relu=False)
    for image in (large, small, large):
        found = kept(image)
        assert bool((found != 0).any())
        torch.testing.assert_close(found, GuidedGradCAM(copy.deepcopy(net), relu=False)(image), rtol=1e-3, atol=1e-12)
