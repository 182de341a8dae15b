"""Image files: data sets, systems and commands read them alike, and refuse alike what they would read wrongly."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustexplain.commands.explain import read_image
from robustexplain.data import InputSpec
from robustexplain.data.folders import Files
from robustexplain.data.pictures import decoded, fault_of
from robustexplain.errors import InputError, MissingDataError

READERS: dict[str, Callable[[Path], Tensor]] = {
    "data set": lambda path: Files(path.parent, [path.name], [0], 16, "squash", 3)[0][0],
    "system": lambda path: InputSpec((16, 16), "squash", 3).read(path)[0],
    "command": lambda path: read_image(path, size=16)[0],
}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RAMP = np.linspace(0, 1, 40)[None] * np.ones((30, 1))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    memory = io.BytesIO()
    image.save(memory, form, **options)
    return memory.getvalue()


def frames(form: str) -> bytes:
    first = Image.fromarray(PIXELS)
    return encoded(first, form, save_all=True, append_images=[first.rotate(90)])


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


GOOD_PNG = encoded(Image.fromarray(PIXELS), "PNG")
GOOD_JPEG = encoded(Image.fromarray(PIXELS), "JPEG")
HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 8, 0, 0, 0, 0))
REFUSED: dict[str, tuple[bytes, str]] = {
    "grey of 16 bits": (encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"), "more than 8 bits a pixel"),
    "tiff of 32 bits": (encoded(Image.fromarray((RAMP * 1e6).astype(np.int32)), "TIFF"), "more than 8 bits a pixel"),
    "float tiff": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "more than 8 bits a pixel"),
    "moving gif": (frames("GIF"), "several frames"),
    "moving png": (frames("PNG"), "several frames"),
    "moving webp": (frames("WEBP"), "several frames"),
    "pages": (frames("TIFF"), "several frames"),
    "bomb": (encoded(Image.new("1", (14000, 14000)), "PNG"), "decompression bomb"),
    "bomb that PIL warns of": (encoded(Image.new("1", (10000, 9000)), "PNG"), "10000 x 9000 pixels; at most 89478485"),
    "text bomb": (
        png(HEADER, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**23)), chunk(b"IDAT", b"")),
        "too large",
    ),
    "empty file": (b"", "cannot identify"),
    "text": (b"no image", "cannot identify"),
    "cut jpeg": (GOOD_JPEG[:-40], "truncated"),
    "cut png": (GOOD_PNG[:-60], "truncated"),
    "header alone": (png(HEADER), "."),
    "broken chunk": (GOOD_PNG.replace(b"IDAT", b"\0\1\2\3"), "cannot identify"),
    "broken stream": (png(HEADER, chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 50), chunk(b"IEND", b"")), "."),
    "program": (encoded(Image.fromarray(PIXELS), "EPS"), "EPS: reading it would run another program"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_wrongly_is_refused_by_all_readers(name: str, tmp_path: Path) -> None:
    content, reason = REFUSED[name]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for read in READERS.values():
        with pytest.raises(InputError, match=rf"cannot read the image '.*picture\.png': .*{reason}"):
            read(path)
    assert "picture.png" in fault_of(path)


def test_a_picture_in_memory_is_checked_as_a_file_is() -> None:
    spec = InputSpec((16, 16), "crop", 3)
    for picture, reason in (
        (Image.new("I;16", (9, 9)), "more than 8 bits"),
        (Image.new("RGB", (0, 9)), "it has no pixels: 0 x 9"),
        (Image.new("L", (1, 9000)), "too narrow to be cut"),
    ):
        with pytest.raises(InputError, match=rf"cannot read the image: .*{reason}"):
            spec.read(picture)
    with pytest.raises(InputError, match="at most 8192 pixels a side"):
        decoded(Image.new("L", (9, 9)), (10**6, 10**6), "squash", 1)
    with pytest.raises(InputError, match="at most 8192 pixels a side"):
        InputSpec((10**6, 10**6))


def test_a_link_to_nothing_and_a_name_that_no_file_can_have_are_no_image(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for path, words in ((tmp_path / "gone.png", "a link to nothing"), (tmp_path / ("x" * 5000), "no image at")):
        with pytest.raises(MissingDataError, match=words):
            decoded(path, None, "crop", 3)


def transparent() -> dict[str, Image.Image]:
    """A red square on nothing, below which green is hidden, in every mode that has transparency."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[8:24, 8:24] = [255, 0, 0, 255]
    rgba = Image.fromarray(pixels)
    solid = Image.fromarray(pixels[..., :3])
    grey = np.dstack([np.full((32, 32), 9, np.uint8), pixels[..., 3]])
    palette = Image.fromarray((pixels[..., 3] > 0).astype(np.uint8), "P")
    palette.putpalette([0, 255, 0, 255, 0, 0])
    alpha = palette.convert("PA")
    alpha.putalpha(rgba.getchannel("A"))
    return {
        "RGBA": rgba,
        "LA": Image.fromarray(grey),
        "PA": alpha,
        "premultiplied": rgba.convert("RGBa"),
        "grey premultiplied": Image.fromarray(grey).convert("La"),
        "palette": stored(palette, transparency=0),
        "palette, a byte each": stored(palette, transparency=b"\0\xff"),
        "colour key": stored(solid, transparency=(0, 255, 0)),
        "grey key": stored(Image.fromarray(grey[..., 0] + pixels[..., 3] // 8), transparency=9),
        "grey palette of one bit": stored(Image.fromarray(pixels[..., 3] > 0), transparency=0),
    }


def stored(image: Image.Image, **options: Any) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "PNG", **options)))


@pytest.mark.parametrize("name", transparent())
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_parts_are_white_and_solid_ones_stay(name: str, channels: int) -> None:
    picture = transparent()[name]
    x = decoded(picture, None, "crop", channels)
    assert (x[:, :8] == 1).all()
    solid = picture.convert("LA") if picture.mode == "La" else picture
    inside = solid.convert("RGBA").convert("RGB" if channels == 3 else "L")
    expected = torch.from_numpy(np.asarray(inside).reshape(32, 32, channels).copy()).permute(2, 0, 1) / 255
    assert torch.equal(x[:, 8:24, 8:24], expected[:, 8:24, 8:24])


def test_half_transparent_is_mixed_with_white_and_solid_alpha_changes_nothing() -> None:
    pixels = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])
    plain = decoded(Image.fromarray(PIXELS), (8, 8), "crop", 3)
    assert torch.equal(decoded(Image.fromarray(pixels), (8, 8), "crop", 3), plain)
    pixels[..., 3] = 51
    x = decoded(Image.fromarray(pixels), None, "crop", 3)
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255 * 0.2 + 0.8
    assert (x - expected).abs().max() < 1.01 / 255


def test_a_cameras_previews_do_not_make_a_photograph_several_frames(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(frames("MPO"))
    (tmp_path / "b.jpg").write_bytes(GOOD_JPEG)
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    a, b = (decoded(tmp_path / name, (16, 16), "crop", 3) for name in ("a.jpg", "b.jpg"))
    assert (a - b).abs().max() < 0.1
    assert not fault_of(tmp_path / "a.jpg", thorough=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA"])
def test_damaged_files_end_in_no_other_exception(form: str, tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "x"
    good = encoded(Image.fromarray(PIXELS[:8, :8]), form)
    refused = 0
    for _ in range(60):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.randrange(1, len(content))] if rng.random() < 0.5 else content)
        fault_of(path)
        try:
            assert decoded(path, (6, 6), "crop", 3).isfinite().all()
        except InputError:
            refused += 1
    assert refused


def test_a_quick_look_finds_files_that_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in (GOOD_PNG, GOOD_JPEG):
        path.write_bytes(content)
        assert not fault_of(path, thorough=False)
        for length in range(1, len(content) - 8, 97):
            path.write_bytes(content[:length])
            assert fault_of(path, thorough=False)
            assert fault_of(path)
