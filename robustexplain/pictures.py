"""Pictures of images, maps and matrices, as PNG bytes. matplotlib is imported where it is used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from . import maps as ops


def picture(image: Tensor, side: int = 96) -> bytes:
    """An image ``[C, H, W]`` in ``[0, 1]`` as PNG, at least ``side`` pixels high; one channel is shown grey."""
    array = image.detach().clamp(0, 1).permute(1, 2, 0).float().numpy()
    return _png(array.repeat(3, 2) if array.shape[2] == 1 else array[:, :, :3], side)


def perturbation(image: Tensor, attacked: Tensor, gain: float = 10.0, side: int = 96) -> bytes:
    """The change ``[C, H, W]`` times ``gain`` around mid-grey."""
    return picture((0.5 + gain * (attacked - image)).clamp(0, 1), side)


def heat_map(attribution: Tensor, image: Tensor | None = None, side: int = 96) -> bytes:
    """A map ``[H, W]``, rescaled to ``[0, 1]``, in inferno; over a faint grey ``image`` if one is given."""
    return _png(coloured(attribution, image), side)


def magnitudes(attribution: Tensor) -> Tensor:
    """Magnitudes of a map ``[H, W]``, cut off at their 99th percentile: one bright pixel would leave the rest black."""
    size = attribution.abs().float()
    return size.clamp(max=float(size.quantile(0.99)) or 1.0)


def coloured(attribution: Tensor, image: Tensor | None = None) -> np.ndarray:
    """The colours ``[H, W, 3]`` of a heat map."""
    from matplotlib import colormaps

    scaled = ops.minmax(attribution[None].detach().float())[0].numpy()
    heat = colormaps["inferno"](scaled)[:, :, :3]
    if image is None:
        return np.asarray(heat)
    grey = image.detach().float().mean(0).numpy()[:, :, None]
    return np.asarray(0.25 * grey + 0.75 * heat)


def matrix(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, texts: Sequence[Sequence[str]], good: str
) -> bytes:
    """A matrix of measures as a coloured picture.

    Args:
        rows: labels, top to bottom.
        columns: labels, left to right.
        values: ``[rows, columns]``; NaN is drawn as a hole.
        texts: what is written in each cell.
        good: ``high`` or ``low`` is green (shares in ``[0, 1]``); ``neither`` shades distances in blue.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 + 1.25 * len(columns), 1.4 + 0.52 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown = np.ma.masked_invalid(values)
    colours = {"high": "RdYlGn", "low": "RdYlGn_r", "neither": "Blues"}[good]
    top = 1.0 if good != "neither" else max(0.3, float(shown.max()) if shown.count() else 0.3)
    axes.imshow(shown, cmap=colours, vmin=0, vmax=top, aspect="auto", alpha=0.65)
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="left", fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5, linespacing=1.25)
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure_bytes(figure)


def strip(panels: Sequence[tuple[str, np.ndarray]], title: str = "") -> bytes:
    """Panels side by side, each ``(caption, [H, W, 3])``, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(panels), 2.7), dpi=110, layout="constrained")
    for axes, (caption, array) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axes.imshow(np.clip(array, 0, 1), interpolation="nearest")
        axes.set_title(caption, fontsize=9)
        axes.axis("off")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure_bytes(figure)


def figure_bytes(figure: Any) -> bytes:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    # No software or date in the file: the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _png(array: np.ndarray, side: int) -> bytes:
    from PIL import Image

    whole = Image.fromarray((np.clip(array, 0, 1) * 255).round().astype(np.uint8))
    scale = max(1, round(side / whole.height))
    buffer = io.BytesIO()
    whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
