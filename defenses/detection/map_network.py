"""A small network that classifies maps."""

from __future__ import annotations

from torch import Tensor, nn

from robustexplain import maps as ops
from robustexplain.models import ModelSpec
from robustexplain.registry import PARTS
from robustexplain.rounding import like_weights


def small_cnn(channels: int, width: int) -> nn.Sequential:
    """Three convolutions on ``[B, channels, H, W]``, of ``width`` channels and twice as many; one logit ``[B, 1]``."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 1),
    )


@PARTS.register("map-network")
class MapNetwork(nn.Module):
    """A small CNN on maps ``[B, H, W]`` with one logit ``[B]``; above 0 is attacked."""

    def __init__(self, side: int = 32, width: int = 16) -> None:
        super().__init__()
        self.side, self.width = side, width
        self.spec = ModelSpec("map-network", {"side": side, "width": width})
        self.layers = small_cnn(1, width)

    def forward(self, maps: Tensor) -> Tensor:
        """``[B]`` logits; maps are rescaled by their largest magnitude and resized to ``side`` first."""
        seen = ops.resize(ops.absmax(maps), (self.side, self.side))
        logits: Tensor = self.layers(like_weights(seen[:, None], self))[:, 0]
        return logits
