"""A model with a trained network in front of it that redraws its images."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import maps as ops
from ..errors import InputError
from ..registry import PARTS
from ..rounding import like_weights
from .around import PlacedAround
from .classifier import ModelSpec
from .in_front import passed_by


class Reformer(nn.Module):
    """A network of images ``[B, C, H, W]`` in ``[0, 1]`` to images of the same shape and range; samples are kept apart.

    A subclass registers how it is rebuilt, and says so in ``spec``.
    """

    name: ClassVar[str]
    stands_in_front: ClassVar[bool] = True
    """Its outputs are images, not features of the network behind it."""
    random: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    moves: ClassVar[bool] = False


class Reformed(PlacedAround):
    """A model that sees what a network makes of its images; differentiable through both.

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, gives logits ``[B, K]``.
        network: what stands in front of it.

    Raises:
        InputError: ``network`` is no :class:`Reformer`.
    """

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        super().__init__(model)
        if not isinstance(network, Reformer):
            raise InputError(f"Reformed needs a Reformer in front of the model, got {type(network).__name__}")
        self.transforms = nn.ModuleList([network]).eval()

    @property
    def placed(self) -> ModelSpec:
        """How to put it around its model."""
        return self.placed_as("reformed", network=self.transforms[0])

    def around(self, model: nn.Module) -> Reformed:
        """The same network in front of another model."""
        return Reformed(model, self.transforms[0])

    def transformed(self, x: Tensor) -> Tensor:
        """What the network makes of ``x``; ``x`` itself where that has been done already."""
        return x if passed_by(self) else self.transforms[0](x)

    def taken_back(self, maps: Tensor, x: Tensor) -> Tensor:
        """The maps: the network leaves every pixel in its place."""
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        logits: Tensor = self.model(self.transformed(x))
        return logits


PARTS.register("reformed", paper="Liao et al. 2018; Meng and Chen 2017")(Reformed)


class DenoisingUNet(Reformer):
    """``x - d(x)``, ``d`` a small U-Net that draws the adversary's part of the image (Liao et al. 2018).

    Blocks of two 3 x 3 convolutions, halved on the way down, joined with the finer ones on the way up. Departures: two
    or three scales instead of five, and groups are normalised instead of batches, so that samples are kept apart in
    training too. The last layer starts at zero: an untrained one changes nothing.

    Args:
        channels: of the images.
        width: channels of the first block, a multiple of 4; twice as many at each coarser scale.
        levels: scales.
    """

    name: ClassVar[str] = "denoising-unet"

    def __init__(self, channels: int, width: int = 16, levels: int = 2) -> None:
        super().__init__()
        if width < 4 or width % 4 or levels < 1:
            raise InputError(f"a U-Net needs a width that 4 divides and one level at least, got {width} and {levels}")
        widths = [width * 2**i for i in range(levels)]
        self.down = nn.ModuleList([_block(i, o) for i, o in zip([channels, *widths], widths, strict=False)])
        self.up = nn.ModuleList([_block(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True)])
        self.draw = nn.Conv2d(width, channels, 1)
        for parameter in self.draw.parameters():
            nn.init.zeros_(parameter)
        self.spec = ModelSpec(self.name, {"channels": channels, "width": width, "levels": levels})

    def forward(self, x: Tensor) -> Tensor:
        """The denoised images.

        Raises:
            InputError: images too small to be halved so often.
        """
        if min(x.shape[-2:]) < 2 ** len(self.up):
            raise InputError(f"images of {list(x.shape[-2:])} cannot be halved {len(self.up)} times")
        seen: list[Tensor] = []
        features = like_weights(x, self)
        for i, block in enumerate(self.down):
            features = block(F.avg_pool2d(features, 2) if i else features)
            seen.append(features)
        for block, finer in zip(self.up, seen[-2::-1], strict=True):
            coarse = F.interpolate(features, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            features = block(torch.cat([coarse, finer], 1))
        return ops.clipped(x - self.draw(features).to(x.dtype))


def _block(width_in: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first in (width_in, width):
        layers += [nn.Conv2d(first, width, 3, padding=1, bias=False), nn.GroupNorm(4, width), nn.ReLU()]
    return nn.Sequential(*layers)


PARTS.register(DenoisingUNet.name, paper="Liao et al. 2018")(DenoisingUNet)


class AutoEncoder(Reformer):
    """MagNet's auto-encoder: convolutions of 3 x 3, sigmoids, one halving (Meng and Chen 2017 and code).

    Args:
        channels: of the images.
        width: channels of every hidden layer, 3 in the code.
        pooled: average pooling behind the first layer, and back up behind the third.
    """

    name: ClassVar[str] = "auto-encoder"

    def __init__(self, channels: int, width: int = 3, *, pooled: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"an auto-encoder needs a width of at least 1, got {width}")
        self.pooled = pooled
        # The authors' MNIST network has a layer before and one behind the halving, on the way down and up.
        sizes = [channels, *([width] * (4 if pooled else 2)), channels]
        self.layers = nn.ModuleList([nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(sizes)])
        self.spec = ModelSpec(self.name, {"channels": channels, "width": width, "pooled": pooled})

    def forward(self, x: Tensor) -> Tensor:
        """The images as the auto-encoder knows them.

        Raises:
            InputError: images of one pixel, which cannot be halved.
        """
        if self.pooled and min(x.shape[-2:]) < 2:
            raise InputError(f"images of {list(x.shape[-2:])} cannot be halved")
        features = like_weights(x, self)
        for i, layer in enumerate(self.layers):
            if self.pooled and i == 1:
                features = F.avg_pool2d(features, 2, ceil_mode=True)
            if self.pooled and i == 3:
                features = F.interpolate(features, size=x.shape[-2:], mode="nearest")
            features = layer(features).sigmoid()
        return features.to(x.dtype)


PARTS.register(AutoEncoder.name, paper="Meng and Chen 2017")(AutoEncoder)
