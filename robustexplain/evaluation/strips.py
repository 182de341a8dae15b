"""Pictures of a report's cells: each once in the page, however many cells show it, and small enough for a mail."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor

from .. import files, plots

SIDE = 80
"""Pixels that the longer side of a picture has at most; smaller ones are stored as they are and shown larger."""
SHARP = 48
"""Up to this side, pictures are stored without loss."""
MOST = 480
"""How many inputs all cells of a page show together, at most; each cell shows one at least."""


@dataclass
class Pictures:
    """The pictures of a page, by content."""

    known: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    def add(self, array: np.ndarray, words: str) -> Markup:
        """Keep a picture ``[H, W, 3]`` in ``[0, 1]``, and what shows it in the page."""
        uri, width, height = encoded(array)
        name = f"p{files.digest(uri)[:12]}"
        self.known[name] = (uri, width, height)
        inside = f'<title>{escape(words)}</title><use href="#{name}"/>'
        return Markup(f'<svg class="p" viewBox="0 0 {width} {height}" role="img">{inside}</svg>')

    @property
    def definitions(self) -> Markup:
        """Every picture, for the start of the page."""
        images = (
            f'<image id="{name}" width="{w}" height="{h}" href="{uri}"/>' for name, (uri, w, h) in self.known.items()
        )
        return Markup(f'<svg width="0" height="0" class="defs" aria-hidden="true"><defs>{"".join(images)}</defs></svg>')


def encoded(array: np.ndarray) -> tuple[str, int, int]:
    """A picture as a data URI with its width and height: PNG if it is small, else JPEG, at most ``SIDE`` pixels."""
    picture = Image.fromarray((np.clip(array, 0, 1) * 255).round().astype(np.uint8))
    small = max(picture.size) <= SHARP
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if small and bool((array[:, :, :1] == array).all()):
        picture = picture.convert("L")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True) if small else picture.save(buffer, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode(), *picture.size


def shown(wanted: int, cells: int) -> int:
    """How many inputs each of so many cells shows."""
    return max(1, min(wanted, MOST // max(cells, 1)))


@dataclass(frozen=True)
class Strip:
    """One input of a cell: its pictures and what is said below them.

    Args:
        panels: markup of the pictures.
        caption: of label and prediction.
        l1: of the maps, where it was measured.
        won: whether the adversary won.
        table: whether it is a table's row.
    """

    panels: tuple[Markup, ...]
    caption: str
    l1: float | None
    won: bool
    table: bool


def strips(
    arrays: Mapping[str, Tensor], count: int, pictures: Pictures, features: Sequence[str], classes: Sequence[str]
) -> list[Strip]:
    """The first inputs of a cell, benign and attacked."""
    found = []
    for i in range(min(count, len(arrays["x"]))):
        label, prediction = int(arrays["label"][i]), int(arrays["prediction"][i])
        found.append(
            Strip(
                panels=tuple(_panels(arrays, i, pictures, features)),
                caption=f"{class_name(label, classes)} → {class_name(prediction, classes)}",
                l1=float(arrays["l1"][i]) if "l1" in arrays else None,
                won=bool(arrays["joint"][i]),
                table=arrays["x"].dim() == 2,
            )
        )
    return found


def class_name(label: int, classes: Sequence[str]) -> str:
    """A class as people call it; its number where nothing else is known."""
    if label >= len(classes):
        return f"class {label}"
    name = classes[label]
    return name if len(name) <= 24 else f"{name[:23]}…"


def _panels(arrays: Mapping[str, Tensor], i: int, pictures: Pictures, features: Sequence[str]) -> list[Markup]:
    """Images and maps, benign and attacked, and a goal map that was given; of a table's row, the bars of its map."""
    x, attacked = arrays["x"][i], arrays["attacked_x"][i]
    if x.dim() == 1:
        bars = plots.bars(arrays["attacked_map"][i], features or [f"column {j}" for j in range(len(x))])
        return [Markup(f'<img alt="attributions" src="data:image/png;base64,{base64.b64encode(bars).decode()}">')]
    images = {"benign": x, "attacked": attacked, "difference times ten": 0.5 + 10 * (attacked - x)}
    maps = {"benign map": "map", "attacked map": "attacked_map", "wanted map": "goal_map"}
    proved = {"what is certified of the benign map": "certificate", "of the attacked map": "attacked_certificate"}
    return [
        *(pictures.add(_rgb(image), words) for words, image in images.items()),
        *(pictures.add(plots.coloured(arrays[n][i]), words) for words, n in maps.items() if n in arrays),
        *(pictures.add(plots.three_colours(arrays[n][i]), words) for words, n in proved.items() if n in arrays),
    ]


def _rgb(image: Tensor) -> np.ndarray:
    array = image.detach().clamp(0, 1).permute(1, 2, 0).float().numpy()
    return array.repeat(3, 2) if array.shape[2] == 1 else np.asarray(array[:, :, :3])
