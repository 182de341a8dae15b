"""The harmless changes of images and of tables, and which are usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .. import maps as ops
from ..checks import Kind
from ..errors import InputError
from ..fields import Count, Eps, Fraction, Positive
from ..random_streams import Streams
from ..registry import HARMLESS
from .base import Transform
from .harmless import HarmlessChange
from .jpeg import JPEG
from .squeezing import BitDepth


@HARMLESS.register("uniform-noise")
@dataclass(frozen=True)
class UniformNoise(HarmlessChange):
    """Uniform noise of up to ``eps`` on every pixel.

    Args:
        eps: largest change of a pixel.
    """

    eps: Eps = 2 / 255

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        return ops.clipped(x + streams.uniform(x, -self.eps, self.eps))


@HARMLESS.register("gaussian-noise")
@dataclass(frozen=True)
class GaussianNoise(HarmlessChange):
    """Gaussian noise on every pixel.

    Args:
        std: its standard deviation.
    """

    std: Eps = 2 / 255

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        return ops.clipped(x + self.std * streams.normal(x))


@HARMLESS.register("jpeg")
@dataclass(frozen=True)
class Compression(HarmlessChange):
    """JPEG compression, as the transform ``jpeg-QUALITY`` does it.

    Args:
        quality: from 1 to 100.
    """

    quality: Count = 75

    def __post_init__(self) -> None:
        super().__post_init__()
        JPEG(self.quality)

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        return _through(JPEG(self.quality), x)


@HARMLESS.register("brightness")
@dataclass(frozen=True)
class Brightness(HarmlessChange):
    """All pixels times one factor, drawn for each image from ``[1 - by, 1 + by]``.

    Args:
        by: largest share by which an image is brighter or darker.
    """

    by: Fraction = 0.02

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        return ops.clipped(x * _factor(x, streams, self.by))


@HARMLESS.register("contrast")
@dataclass(frozen=True)
class Contrast(HarmlessChange):
    """Distances to the image's mean times one factor, drawn for each image from ``[1 - by, 1 + by]``.

    Args:
        by: largest share by which they are larger or smaller.
    """

    by: Fraction = 0.02

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        mean = x.flatten(1).mean(1)[:, None, None, None]
        return ops.clipped(mean + (x - mean) * _factor(x, streams, self.by))


@HARMLESS.register("shift")
@dataclass(frozen=True)
class Shift(HarmlessChange):
    """A shift by whole pixels in a drawn direction (straight or diagonal); the border's pixels are repeated.

    Args:
        pixels: how far.
    """

    pixels: Count = 1

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        direction = streams.integers(8).to(x.device)
        # The eight neighbours of a pixel: numbers of a 3 x 3 grid without its middle.
        place = direction + (direction >= 4)
        down, right = (place // 3 - 1) * self.pixels, (place % 3 - 1) * self.pixels
        rows = (torch.arange(x.shape[2], device=x.device) - down[:, None]).clamp(0, x.shape[2] - 1)
        columns = (torch.arange(x.shape[3], device=x.device) - right[:, None]).clamp(0, x.shape[3] - 1)
        samples = torch.arange(len(x), device=x.device)[:, None, None]
        return x.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()


@HARMLESS.register("resize")
@dataclass(frozen=True)
class Resize(HarmlessChange):
    """To a smaller size and back, bilinearly with antialiasing.

    Args:
        scale: of the smaller size, to the nearest pixel.
    """

    scale: Positive = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale >= 1:
            raise InputError(f"resize: scale must be below 1, got {self.scale!r}")

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        size = tuple(x.shape[-2:])
        small = tuple(max(1, round(self.scale * side)) for side in size)
        down = F.interpolate(x, small, mode="bilinear", antialias=True)
        return ops.clipped(F.interpolate(down, size, mode="bilinear", antialias=True))


@HARMLESS.register("rounding")
@dataclass(frozen=True)
class Rounding(HarmlessChange):
    """Rounding to levels, as an image file does it.

    Args:
        bits: of each channel.
    """

    bits: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        BitDepth(self.bits)

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        return _through(BitDepth(self.bits), x)


@HARMLESS.register("column-noise")
@dataclass(frozen=True)
class ColumnNoise(HarmlessChange):
    """Gaussian noise on the numeric columns of a table, in proportion to each column's spread.

    A column of at most two values (a category as 0 and 1, a flag) is no numeric one and stays as it is. A value stays
    within the range of its column.

    Args:
        share: the noise's standard deviation over the column's.
        spread: each column's standard deviation, 0 where it is no numeric one, by :meth:`fitted`.
        low: each column's smallest value.
        high: each column's largest value.
    """

    share: Fraction = 0.02
    spread: tuple[float, ...] = field(default=(), metadata={"recipe": False})
    low: tuple[float, ...] = field(default=(), metadata={"recipe": False})
    high: tuple[float, ...] = field(default=(), metadata={"recipe": False})

    takes: ClassVar[tuple[Kind, ...]] = ("tables",)

    def fitted(self, x: Tensor) -> Self:
        """With the spread of the columns of ``x`` ``[N, D]``."""
        x = x.detach().double().cpu()
        numeric = [len(column.unique()) > 2 for column in x.T]
        spread = x.std(0, correction=0) * torch.tensor(numeric)
        low, high = x.aminmax(dim=0)
        return replace(self, spread=tuple(spread.tolist()), low=tuple(low.tolist()), high=tuple(high.tolist()))

    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        known = self if self.spread else self.fitted(x)
        if len(known.spread) != x.shape[1]:
            raise InputError(f"column-noise was fitted to {len(known.spread)} columns, got {x.shape[1]}")
        spread, low, high = (x.new_tensor(values) for values in (known.spread, known.low, known.high))
        moved = (x + self.share * spread * streams.normal(x)).clamp(torch.minimum(low, x), torch.maximum(high, x))
        return torch.where(spread > 0, moved, x)


def default_changes(shape: Sequence[int]) -> tuple[HarmlessChange, ...]:
    """The harmless changes of inputs of that shape, where nobody says others.

    Images: noise of 2/255, JPEG of quality 75 (grey and RGB images), brightness by 2%. Tables: noise of 2% of each
    column's spread.
    """
    if len(shape) == 1:
        return (ColumnNoise(),)
    return (UniformNoise(), *((Compression(),) if shape[0] in (1, 3) else ()), Brightness())


def harmless_for(
    changes: Sequence[HarmlessChange], shape: Sequence[int], samples: Tensor | None = None
) -> tuple[HarmlessChange, ...]:
    """The changes, or the default ones where there are none, fitted to samples.

    Args:
        changes: none or some.
        shape: of an input.
        samples: of the data, ``[N, ...]``.
    """
    chosen = tuple(changes) or default_changes(shape)
    return chosen if samples is None else tuple(change.fitted(samples) for change in chosen)


def one_of(changes: Sequence[HarmlessChange], x: Tensor, seed: int = 0) -> Tensor:
    """Each input after one of the changes, all equally likely, drawn from its own stream; ``x`` of ``[B, ...]``.

    Raises:
        InputError: no change to choose from, or one of another kind of input.
    """
    if not changes:
        raise InputError("one_of needs a harmless change at least, got none")
    chosen, changed = Streams.of(x, seed, "one-of").integers(len(changes)).to(x.device), x.clone()
    for place, change in enumerate(changes):
        rows = (chosen == place).nonzero()[:, 0]
        if len(rows):
            changed[rows] = change(x[rows], seed)
    return changed


def _factor(x: Tensor, streams: Streams, by: float) -> Tensor:
    return streams.uniform(x.new_empty(len(x), 1, 1, 1), 1 - by, 1 + by)


@torch.no_grad()
def _through(transform: Transform, x: Tensor) -> Tensor:
    changed: Tensor = transform(x)
    return changed
