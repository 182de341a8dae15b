"""What an image processor of transformers does to an image, measured by what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.pictures import Resize
from ..errors import InputError
from .classifier import per_channel


@dataclass(frozen=True)
class Preparation:
    """How images become a model's input: ``((x - mean) / std)``, with the channels in the other order if ``flip``.

    Args:
        mean: a number a channel of ``x``.
        std: a number a channel of ``x``.
        flip: whether the model takes blue first.
        size: ``(H, W)``; ``None``: unknown.
        resize: how an image is brought to ``size``. What is cut off beyond a square (256 to 224) is not kept.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    size: tuple[int, int] | None = None
    resize: Resize = "crop"

    def of_channels(self, channels: int) -> Preparation:
        """The same for images of another number of channels: the average for each."""
        mean, std = (per_channel(values, channels) for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    def options(self) -> dict[str, Any]:
        """The fields, as JSON writes them."""
        size = None if self.size is None else list(self.size)
        lists = {"mean": list(self.mean), "std": list(self.std), "size": size}
        return {**lists, "flip": self.flip, "resize": self.resize}


def measured(processor: Any, channels: int, what: str) -> Preparation:
    """The normalisation that a processor applies, found by black, white, single-coloured and random images.

    Raises:
        InputError: it does more than normalise each channel.
    """
    side, rng = 8, np.random.default_rng(0)
    frames = np.zeros((3, side, side, channels), dtype=np.uint8)
    frames[1] = 255
    frames[2] = rng.integers(0, 256, frames[2].shape)
    # Where the default device is the meta device, the processor would compute nothing.
    with torch.device("cpu"):
        out = _processed(processor, frames, what)
        x = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
        low, high = out[0].mean((1, 2)), out[1].mean((1, 2))
        for flip in (False, True):
            mean, std = (v.flip(0) if flip else v for v in (-low / (high - low), 1 / (high - low)))
            expected = (x - mean[:, None, None]) / std[:, None, None]
            if torch.allclose(out, expected.flip(1) if flip else expected, atol=1e-4):
                return Preparation(_numbers(mean), _numbers(std), flip, *_fitting(processor))
    raise InputError(
        f"the image processor of {what} ({type(processor).__name__}) does more than normalise each channel: give the "
        "normalisation yourself, with mean=[...] and std=[...]"
    )


def _processed(processor: Any, frames: np.ndarray, what: str) -> Tensor:
    try:
        found = processor(
            images=list(frames), do_resize=False, do_center_crop=False, input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"]  # fmt: skip
        values: Tensor = torch.as_tensor(found).double()
    except Exception as error:  # each processor has its own errors
        raise InputError(f"the image processor of {what} cannot be looked into: {error}") from error
    if list(values.shape) != [len(frames), frames.shape[3], *frames.shape[1:3]]:
        raise InputError(f"the image processor of {what} gives {list(values.shape)} of images {list(frames.shape)}")
    return values


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)


def _fitting(processor: Any) -> tuple[tuple[int, int] | None, Resize]:
    """The size that images end up with, and how they are brought there."""
    size, crop = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    edge = _side(size, "shortest_edge")
    if getattr(processor, "do_center_crop", None) and crop is not None:
        return _both(crop), "crop" if edge is not None else "squash"
    # ConvNeXt's processor warps images to 384 pixels and more, and crops below.
    warps = getattr(processor, "crop_pct", None) is not None and edge is not None and edge >= 384
    return _both(size), "squash" if edge is None or warps else "crop"


def _both(size: Any) -> tuple[int, int] | None:
    edge = _side(size, "shortest_edge")
    height, width = _side(size, "height") or edge, _side(size, "width") or edge
    return None if height is None or width is None else (height, width)


def _side(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return value if isinstance(value, int) else None
