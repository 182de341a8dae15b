"""Image files and pictures as tensors: one way of reading them, for data sets, systems and commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError, MissingDataError

Resize: TypeAlias = Literal["crop", "squash"]
"""``crop`` scales until the image covers the size and cuts the centre out; ``squash`` changes the proportions."""

MOST_SIDE = 8192
"""The longest side in pixels that images are brought to."""
_ONE_IMAGE = ("MPO", "PSD")
"""Formats whose first frame is the image: a camera's previews, the layers that it is made of."""


def decoded(
    image: Image.Image | str | PathLike[str], size: tuple[int, int] | None, resize: Resize, channels: int
) -> Tensor:
    """An image as float32 ``[C, H, W]`` in ``[0, 1]``: upright, on white, converted, then resized.

    It is turned upright by its EXIF orientation. Transparent parts are laid on white. Colours are converted as PIL
    does, without colour profiles.

    Args:
        image: a picture of PIL's (its present frame), or a file that PIL reads.
        size: ``(H, W)``; ``None`` keeps the image's own.
        resize: how it is brought to ``size``.
        channels: 3 or 1.

    Raises:
        MissingDataError: no such file.
        InputError: PIL cannot read it; more than 8 bits a pixel, several frames, no pixels or too many.
    """
    if size is not None and max(size) > MOST_SIDE:
        raise InputError(f"images are brought to at most {MOST_SIDE} pixels a side, got {size[0]} x {size[1]}")
    if not isinstance(image, Image.Image):
        with opened(Path(image)) as found:
            return _tensor(found, size, resize, channels)
    with _named(""):
        _check(image)
        return _tensor(image, size, resize, channels)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file that is refused where its header tells enough; any failure until it is closed names it.

    Raises:
        MissingDataError: no such file.
        InputError: as for :func:`decoded`.
    """
    if not os.path.isfile(path):
        raise MissingDataError(f"no image at {path}" + (", a link to nothing" if os.path.islink(path) else ""))
    with _named(f" {str(path)!r}"), Image.open(path) as image:
        if image.format == "EPS":
            raise InputError("EPS: reading it would run another program; save it as PNG")
        if image.format not in _ONE_IMAGE and getattr(image, "is_animated", False):
            raise InputError("it holds several frames; save the one that is meant as an image of its own")
        _check(image)
        yield image


def fault_of(path: Path, thorough: bool = True) -> str:
    """Why an image file cannot be read; empty where it can.

    Args:
        path: the file.
        thorough: decode it; else a JPEG file is only looked at, whether it ends as it should, and of a PNG file the
            checksums are compared.
    """
    try:
        with opened(path) as image:
            if image.format == "PNG" and not thorough:
                image.verify()
            elif thorough or image.format not in ("JPEG", "MPO") or b"\xff\xd9" not in _tail(path):
                image.draft("RGB", (1, 1))  # an eighth of the size, which is quicker, where the format can
                _tensor(image, (1, 1), "squash", 3)
    except InputError as error:
        return str(error)
    return ""


def _tail(path: Path, size: int = 4096) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(size, path.stat().st_size), os.SEEK_END)
        return file.read()


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    # PIL's readers raise almost anything on damaged files: SyntaxError, struct.error, IndexError, zlib.error, ...
    except Exception as error:
        text = str(error) if isinstance(error, InputError) or " " in str(error) else f"{type(error).__name__} {error}"
        raise InputError(f"cannot read the image{name}: {text}") from error


def _check(image: Image.Image) -> None:
    if image.mode.startswith(("I", "F")):
        raise InputError(f"mode {image.mode}: more than 8 bits a pixel, which conversion would clip")
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if not pixels:
        raise InputError(f"it has no pixels: {image.width} x {image.height}")
    if most is not None and pixels > most:
        raise InputError(f"{image.width} x {image.height} pixels; at most {most} are read (PIL.Image.MAX_IMAGE_PIXELS)")


def _tensor(image: Image.Image, size: tuple[int, int] | None, resize: Resize, channels: int) -> Tensor:
    upright = _on_white(ImageOps.exif_transpose(image))
    if upright.mode == "LAB":
        upright = upright.convert("RGB")  # PIL knows no other way
    upright = upright.convert("RGB" if channels == 3 else "L")
    fitted = upright if size is None else _fitted(upright, size, resize)
    array: Any = np.asarray(fitted, dtype=np.float32).reshape(fitted.height, fitted.width, channels)
    return torch.from_numpy(array / 255).permute(2, 0, 1).contiguous()


def _on_white(image: Image.Image) -> Image.Image:
    """The image without transparency; conversion alone would show the colour that is hidden below it."""
    if not image.has_transparency_data:
        return image
    solid = image.convert("LA") if image.mode == "La" else image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), solid.convert("RGBA"))


def _fitted(image: Image.Image, size: tuple[int, int], resize: Resize) -> Image.Image:
    height, width = size
    if resize == "squash":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    # The side that is scarcer decides the scale, so that the other one has enough to cut from.
    if image.height * width <= image.width * height:
        scaled = height * image.width // image.height, height
    else:
        scaled = width, width * image.height // image.width
    if max(scaled) > max(image.size) and max(scaled) > 4 * MOST_SIDE:
        raise InputError(
            f"{image.width} x {image.height} pixels are too narrow to be cut to {width} x {height}: use resize squash"
        )
    large = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return large.crop((left, top, left + width, top + height))
