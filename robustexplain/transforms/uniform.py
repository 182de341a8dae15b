"""Uniform noise in front of a model."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .. import maps as ops
from ..errors import FieldError
from ..random_streams import Streams
from ..registry import TRANSFORMS
from .base import Transform, within


@TRANSFORMS.register("uniform-noise", paper="Cao and Gong 2017 (a point of the hypercube)")
class RandomPoint(Transform):
    """A random point of the hypercube around the image, cut off at black and white (Cao and Gong 2017).

    Drawn from each sample's own stream. One draw; they take the vote of a thousand.

    Args:
        radius: largest change of a pixel, 0 or from 0.0001 to 1.
        seed: of the draws.
    """

    form: ClassVar[str] = "uniform-noise-RADIUS[-SEED]"
    random: ClassVar[bool] = True

    def __init__(self, radius: float, seed: int = 0) -> None:
        super().__init__(f"uniform-noise-{radius:g}" + (f"-{seed}" if seed else ""))
        # A smaller one would be written with an exponent, which no name has.
        if radius != 0 and not 1e-4 <= radius <= 1:
            raise FieldError("RandomPoint", "radius", f"must be 0, or from 0.0001 to 1, got {radius!r}")
        within("RandomPoint", "seed", seed, 0, 2**63 - 1)
        self.radius, self.seed = float(f"{radius:g}"), seed

    def forward(self, x: Tensor) -> Tensor:
        """The images with noise."""
        streams = Streams.of(x, self.seed, "uniform-noise")
        return ops.clipped(x + streams.uniform(x, -self.radius, self.radius))

    def redrawn(self, seed: int) -> RandomPoint:
        """The transform with the draws of another seed."""
        return RandomPoint(self.radius, seed)
