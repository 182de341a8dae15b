"""Harmless changes: what reaches a system where there is no adversary.

A row's maps and alarms are calibrated on them: a forged map is plausible if it is no further from the map that it
should resemble than such changes move the map. They are components of a recipe: ``{name: uniform-noise, eps: 2/255}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .. import checks
from .. import maps as ops
from ..checks import Kind
from ..errors import InputError
from ..fields import Count, Eps, Fraction, Positive, check_fields
from ..random_streams import Streams
from ..registry import HARMLESS
from ..schema import make
from .base import Transform
from .jpeg import JPEG
from .squeezing import BitDepth


@dataclass(frozen=True)
class HarmlessChange(ABC):
    """A change of inputs that an honest world makes: ``change(x, seed=0)`` gives inputs of the same shape and range.

    Each sample's draws come from its own random stream. A subclass is a frozen dataclass, registered in ``HARMLESS``.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    """The kinds of input that it changes."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, x: Tensor, seed: int = 0) -> Tensor:
        """The changed inputs, ``[B, C, H, W]`` in ``[0, 1]`` (tables ``[B, D]``).

        Raises:
            InputError: bad ``x``, or of a kind that it does not take.
        """
        checks.inputs(x)
        name = HARMLESS.name_of(type(self))
        checks.kind(x, self.takes, name)
        changed = self._changed(x, Streams.of(x, seed, name))
        if changed.shape != x.shape:
            raise InputError(f"{name} must keep the shape {list(x.shape)}, got {list(changed.shape)}")
        return changed

    @abstractmethod
    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        """The changed inputs; ``x`` is checked."""

    def fitted(self, x: Tensor) -> Self:
        """The change for data of which ``x`` are samples; itself where nothing depends on them."""
        return self

    @property
    def entry(self) -> dict[str, Any]:
        """As a recipe writes it."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("recipe", True)}
        return {"name": HARMLESS.name_of(type(self)), **own}

    @classmethod
    def from_entry(cls, entry: Any, path: str) -> HarmlessChange:
        """The change that an entry of a recipe describes: a name, or a mapping with a name and settings.

        Raises:
            InputError: an unknown name, or a setting that it does not have.
        """
        if isinstance(entry, HarmlessChange):
            return entry
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError(f"{path}: a name, or a mapping with a name, is needed, got {entry!r}")
        try:
            build: Any = HARMLESS.get(entry["name"]).build
        except InputError as error:
            raise InputError(f"{path}.name: {error}") from None
        made: HarmlessChange = make(build, {k: v for k, v in entry.items() if k != "name"}, path)
        return made


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


def mixed(changes: Sequence[HarmlessChange], x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Each input after one of the changes, drawn from its own stream, all as likely.

    Args:
        changes: one or more.
        x: the inputs.
        seed: of all draws.

    Returns:
        The changed inputs, and which change was drawn for each, int64 ``[B]`` on the CPU.

    Raises:
        InputError: no change, or one that does not take such inputs.
    """
    if not changes:
        raise InputError("at least one harmless change is needed, got none")
    which = Streams.of(x, seed, "which").integers(len(changes))
    changed = x.clone()
    for index, change in enumerate(changes):
        rows = (which == index).nonzero()[:, 0].to(x.device)
        if len(rows):
            changed[rows] = change(x[rows], seed)
    return changed, which


def _factor(x: Tensor, streams: Streams, by: float) -> Tensor:
    return streams.uniform(x.new_empty(len(x), 1, 1, 1), 1 - by, 1 + by)


@torch.no_grad()
def _through(transform: Transform, x: Tensor) -> Tensor:
    changed: Tensor = transform(x)
    return changed
