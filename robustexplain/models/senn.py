"""A self-explaining network: logits are sums over pixels, weighted by coefficients that it computes for each input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..registry import MODELS
from .classifier import Classifier
from .small import _centred


def _convolution(width_in: int, width: int, stride: int) -> list[nn.Module]:
    # Groups, not batches, are normalised: the penalty's Jacobian is one of each sample alone, in training too.
    convolution = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.GroupNorm(4, width), nn.ReLU()]


class Parametriser(nn.Module):
    """``theta(x)`` ``[B, K * C, H, W]`` in ``[-1, 1]``: four convolutions, the context of the whole image, and back up.

    Args:
        num_classes: ``K``.
        in_channels: ``C``.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(in_channels, 16, 2),
            *_convolution(16, 32, 1),
            *_convolution(32, 64, 2),
            *_convolution(64, 64, 1),
        )
        self.context = nn.Linear(64, 64)
        self.merge = nn.Sequential(*_convolution(64, 32, 1))
        self.draw = nn.Conv2d(32, num_classes * in_channels, 3, padding=1)
        # Sums over all pixels: with torch's usual weights the first logits would be in the dozens.
        with torch.no_grad():
            self.draw.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """The coefficients of normalised images ``[B, C, H, W]``."""
        features = self.features(x)
        features = features + self.context(features.mean((2, 3)))[:, :, None, None]
        half = [(side + 1) // 2 for side in x.shape[-2:]]
        merged = self.merge(F.interpolate(features, size=half, mode="bilinear", align_corners=False))
        drawn = self.draw(merged)
        return F.interpolate(drawn, size=x.shape[-2:], mode="bilinear", align_corners=False).tanh()


class SelfExplainingNet(nn.Module):
    """``f_c(x) = sum_i theta_ci(x) h_i(x) + b_c`` with the pixels as concepts, ``h(x) = x`` (Alvarez-Melis & Jaakkola).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.concepts = nn.Identity()
        self.parametriser = Parametriser(num_classes, in_channels)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of normalised images ``[B, C, H, W]``."""
        # Also what the coefficients are computed from is behind the (trivial) concepts: one tensor to differentiate by.
        concepts = self.concepts(x)
        theta = self.parametriser(concepts)
        logits: Tensor = (theta.unflatten(1, (self.num_classes, -1)) * concepts[:, None]).sum((2, 3, 4)) + self.bias
        return logits


@MODELS.register("senn", paper="Alvarez-Melis & Jaakkola 2018, section 3")
def senn(num_classes: int = 10, in_channels: int = 1) -> Classifier:
    """A self-explaining network whose concepts are the pixels; the interpreter ``theta`` shows its coefficients.

    Departures: coefficients come from a network of convolutions that takes images of any size of 4 pixels or more, the
    bias is a constant (in the code a concept, with a coefficient that depends on the input, which could hold all of the
    prediction and shows in no map), and there are no concepts learned by an auto-encoder: those have no map.
    """
    return _centred(SelfExplainingNet(num_classes, in_channels), num_classes, in_channels, 28)


def explains_itself(model: nn.Module) -> bool:
    """Whether there is a self-explaining network inside of a model."""
    return any(isinstance(module, SelfExplainingNet) for module in model.modules())


def self_explaining(model: nn.Module) -> str:
    """The dotted name of the self-explaining network inside of a model (empty where it is the model itself).

    Raises:
        UnsupportedModelError: there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, SelfExplainingNet):
            return str(name)
    raise UnsupportedModelError(
        f"this {type(model).__name__} is no self-explaining network: build one with models.load('senn'), or let the "
        "defense 'senn' train one"
    )
