"""Random resizing and padding."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..random_streams import Streams
from ..registry import TRANSFORMS
from .base import Transform, within

GREY = 0.5
"""The authors' padding value, zero in ``[-1, 1]``, in units of ``[0, 1]``."""


@TRANSFORMS.register("resize-pad", paper="Xie et al. 2018 and code")
class ResizePad(Transform):
    """Shrink the image by a random number of pixels and place it at a random position on grey (Xie et al. 2018).

    Size and place are uniform and drawn from each sample's own stream; pixels are the nearest, as in the authors' code.
    Departure: the authors enlarge 299 pixels to 310 to 330 and pad to 331; here the padded image has the size of the
    one given, so that every classifier takes it. One draw; they average the predictions of 30, mirrored or not.

    Args:
        pixels: the shorter side shrinks by 1 up to so many pixels.
        seed: of the draws.
    """

    form: ClassVar[str] = "resize-pad-PIXELS[-SEED]"
    random: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __init__(self, pixels: int, seed: int = 0) -> None:
        super().__init__(f"resize-pad-{pixels}" + (f"-{seed}" if seed else ""))
        within("ResizePad", "pixels", pixels, 1, 1024)
        within("ResizePad", "seed", seed, 0, 2**63 - 1)
        self.pixels, self.seed = pixels, seed

    def forward(self, x: Tensor) -> Tensor:
        """The resized and padded images.

        Raises:
            InputError: images with a side of ``pixels`` or less.
        """
        rows, columns = self._placed(x)
        index, inside = _places(rows.source, columns.source, x), _both(rows.inside, columns.inside)
        seen = x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1)).view_as(x)
        return torch.where(inside[:, None], seen, GREY)

    def taken_back(self, maps: Tensor, x: Tensor) -> Tensor:
        """Maps of the transformed ``x``, read where each pixel of ``x`` is shown; what lies on grey is left out."""
        rows, columns = self._placed(x)
        index = _places(rows.shown, columns.shown, x)
        return maps.flatten(1).gather(1, index).view_as(maps)

    def _placed(self, x: Tensor) -> tuple[_Side, _Side]:
        """Where the rows and the columns of each image go."""
        short = min(x.shape[-2:])
        if short <= self.pixels:
            raise InputError(f"images of {list(x.shape[-2:])} cannot shrink by up to {self.pixels} pixels")
        draws = Streams.of(x, self.seed, "resize-pad").uniform(x.new_empty(len(x), 3, dtype=torch.float64))
        share = (short - 1 - (draws[:, 0] * self.pixels).floor()) / short
        return _side(x.shape[2], share, draws[:, 1]), _side(x.shape[3], share, draws[:, 2])

    def redrawn(self, seed: int) -> ResizePad:
        """The transform with sizes and positions of another seed."""
        return ResizePad(self.pixels, seed)


class _Side(NamedTuple):
    """Where the pixels along one side go, ``[B, side]`` each."""

    source: Tensor
    """Of each new pixel the old one."""
    inside: Tensor
    """Whether there is one."""
    shown: Tensor
    """Of each old pixel the new one that shows its place."""


def _side(side: int, share: Tensor, draw: Tensor) -> _Side:
    # A rounding error must not remove a pixel of a side whose exact size is whole.
    size = (side * share + 1e-6).floor().clamp(min=1)
    start = (draw * (side - size + 1)).floor().clamp(max=side - 1)
    pixels = torch.arange(side, device=draw.device)
    place = pixels - start[:, None]
    source = (place * (side / size[:, None]) + 1e-6).floor().long()
    # The new pixel that shows an old one, or for one that is left out the next to it.
    shown = (pixels * (size[:, None] / side) - 1e-6).ceil().minimum(size[:, None] - 1) + start[:, None]
    return _Side(source.clamp(0, side - 1), (place >= 0) & (place < size[:, None]), shown.long().clamp(0, side - 1))


def _places(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """Indices into flattened images, ``[B, H W]``."""
    return (rows[:, :, None] * x.shape[3] + columns[:, None]).flatten(1)


def _both(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, :, None] & columns[:, None]
