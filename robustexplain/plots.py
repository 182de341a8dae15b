"""Pictures of images, maps, tables' rows and matrices, as PNG bytes. matplotlib is imported where it is used."""

from __future__ import annotations

import io
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import maps as ops
from .errors import InputError

if TYPE_CHECKING:
    from .training import EpochRecord

SAFE, MIDDLE, OPEN = "#93d3c1", "#f6eedb", "#f0946a"
"""The colours from what speaks for the defender to what speaks against it: told apart without red and green."""


def picture(image: Tensor, side: int = 96) -> bytes:
    """An image ``[C, H, W]`` in ``[0, 1]`` as PNG, at least ``side`` pixels high; one channel is shown grey."""
    array = image.detach().clamp(0, 1).permute(1, 2, 0).float().numpy()
    return _png(array.repeat(3, 2) if array.shape[2] == 1 else array[:, :, :3], side)


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


def three_colours(decided: Tensor) -> np.ndarray:
    """The colours ``[H, W, 3]`` of a certificate's decisions ``[h, w]``: orange for 1, dark blue for 0, grey for -1."""
    colours = np.array([[0.15, 0.18, 0.33], [0.95, 0.55, 0.15], [0.78, 0.78, 0.78]])
    return np.asarray(colours[decided.detach().long().cpu().numpy()])


def matrix(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, texts: Sequence[Sequence[str]], good: str
) -> bytes:
    """A matrix of measures as a coloured picture, as PNG; see :func:`matrix_figure`."""
    return figure_bytes(matrix_figure(rows, columns, values, texts, good))


def matrix_figure(
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    good: str,
    doubted: np.ndarray | None = None,
    plain: np.ndarray | None = None,
    marked: int = 0,
    each: Mapping[tuple[int, int], Sequence[float]] | None = None,
) -> Any:
    """A matrix of measures as a coloured figure.

    Args:
        rows: labels, top to bottom.
        columns: labels, left to right.
        values: ``[rows, columns]``; NaN is drawn as a hole.
        texts: what is written in each cell.
        good: ``high`` or ``low`` is green (shares in ``[0, 1]``); ``neither`` shades distances in blue.
        doubted: bool ``[rows, columns]``: cells that are hatched, their colour washed out.
        plain: bool ``[rows, columns]``: cells that are drawn grey, whatever their values.
        marked: so many of the first columns are set off by a line, with labels in bold.
        each: the shares of each seed in a cell, drawn as dots between 0, its left side, and 1.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    height = 0.52 if not each else 0.6
    # Labels of 9 points: the longest on the left takes its width, and the last column's leans out to the right.
    beside = max(3.2, 1.0 + 0.075 * max(map(len, rows), default=0))
    figure = Figure(figsize=(beside + 1.25 * len(columns), 1.4 + height * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown = np.ma.masked_invalid(values)
    ends = {"low": (SAFE, MIDDLE, OPEN), "high": (OPEN, MIDDLE, SAFE), "neither": ("#f3f6fb", "#86aede")}[good]
    colours = LinearSegmentedColormap.from_list("matrix", ends)
    top = 1.0 if good != "neither" else max(0.3, float(shown.max()) if shown.count() else 0.3)
    axes.imshow(shown, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for i, j in np.argwhere(plain) if plain is not None else ():
        _cover(axes, i, j, facecolor="#e9ecef", edgecolor="none")
    for i, j in np.argwhere(doubted) if doubted is not None else ():
        _cover(axes, i, j, facecolor="white", alpha=0.65, edgecolor="none")
        _cover(axes, i, j, fill=False, hatch="////", edgecolor="#8a939c", linewidth=0)
    _frame(axes, rows, columns, marked)
    paper = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.75, "edgecolor": "none"}
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            box = paper if doubted is not None and doubted[i, j] else None
            up = 0.08 if each and (i, j) in each else 0.0
            axes.text(j, i - up, text, ha="center", va="center", fontsize=8.5, linespacing=1.25, bbox=box)
    for (i, j), shares in (each or {}).items():
        axes.plot([j - 0.42, j + 0.42], [i + 0.38] * 2, color="#1c2733", linewidth=0.6, alpha=0.5)
        axes.plot([j - 0.42 + 0.84 * share for share in shares], [i + 0.38] * len(shares), "o", color="#1c2733", ms=3.2)
    return figure


def _cover(axes: Any, row: int, column: int, **style: Any) -> None:
    """A patch over one cell of a matrix."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))


def _frame(axes: Any, rows: Sequence[str], columns: Sequence[str], marked: int) -> None:
    """Labels and lines around the cells of a matrix."""
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="left", fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    if marked:
        axes.axvline(marked - 0.5, color="#1c2733", linewidth=2)
        for label in axes.get_xticklabels()[:marked]:
            label.set_fontweight("bold")
    for spine in axes.spines.values():
        spine.set_visible(False)


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


def bars(
    values: Tensor,
    names: Sequence[str],
    other: Tensor | None = None,
    title: str = "",
    captions: tuple[str, str] = ("before", "after"),
    marked: Collection[int] = (),
    most: int = 12,
) -> bytes:
    """A map of a table's row as horizontal bars, the largest magnitude on top, as PNG.

    Args:
        values: attributions ``[D]``, signed.
        names: of the ``D`` columns.
        other: attributions ``[D]`` to be drawn beside them, in the same order and at the same scale.
        title: above the picture.
        captions: of the two sides.
        marked: places of columns whose names are set in bold red, such as a sensitive one; they are always drawn.
        most: how many columns are drawn; those left out are counted.

    Raises:
        InputError: shapes that do not fit, or values that are not finite.
    """
    from matplotlib.figure import Figure

    sides = [values] if other is None else [values, other]
    for side in sides:
        if side.shape != (len(names),) or not len(names) or not torch.isfinite(side).all():
            raise InputError(f"bars need finite values [{len(names)}], one a name, got {list(side.shape)}")
    arrays = [side.detach().cpu().double().numpy() for side in sides]
    shown = _drawn_columns(arrays, marked, most)
    size = (3.4 + 2.6 * len(sides), 1.15 + 0.29 * len(shown))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    drawn = np.stack(arrays)[:, shown]
    # Room for the numbers beyond the ends of the bars.
    room = 0.32 * (float(np.abs(drawn).max()) or 1.0)
    span = min(0.0, float(drawn.min())) - (room if (drawn < 0).any() else room / 8), max(0.0, float(drawn.max())) + room
    panels = np.atleast_1d(figure.subplots(1, len(sides), sharex=True, sharey=True))
    for axes, row, caption in zip(panels, drawn, captions, strict=False):
        _draw_bars(axes, row, span)
        axes.set_title(caption if other is not None else "", fontsize=9)
    panels[0].set_yticks(range(len(shown)), [_short(names[i]) for i in shown], fontsize=9)
    panels[0].invert_yaxis()
    for label, column in zip(panels[0].get_yticklabels(), shown, strict=True):
        if column in marked:
            label.set(color="#c0392b", fontweight="bold")
    left = len(names) - len(shown)
    if left:
        figure.supxlabel(f"{left} more of smaller magnitude", fontsize=8, color="#666666")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure_bytes(figure)


def learning_curves(histories: Mapping[str, Sequence[EpochRecord]]) -> bytes:
    """The course of trainings, as PNG: a panel each, with its loss and, dashed on the right, its figures if it has any.

    Args:
        histories: epochs by the training's name, as :func:`robustexplain.training.histories` reads them.

    Raises:
        InputError: if there are none.
    """
    from matplotlib.figure import Figure

    if not histories:
        raise InputError("there are no learning curves to draw: no history was found")
    across = min(3, len(histories))
    down = -(-len(histories) // across)
    figure = Figure(figsize=(3.6 * across, 2.2 * down), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for (name, records), axes in zip(histories.items(), panels, strict=False):
        _draw_history(axes, name, records)
    for axes in panels[len(histories) :]:
        axes.set_visible(False)
    return figure_bytes(figure)


def _draw_history(axes: Any, name: str, records: Sequence[EpochRecord]) -> None:
    epochs = [record["epoch"] for record in records]
    axes.plot(epochs, [record["loss"] for record in records], marker=".", color="#2e6f9e")
    axes.set_title(name, fontsize=9)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel("loss", fontsize=8, color="#2e6f9e")
    axes.set_xlim(0.5, max(epochs, default=1) + 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(labelsize=8)
    figures = list(dict.fromkeys(key for record in records for key in record["figures"]))
    if not figures:
        return
    right = axes.twinx()
    for key, colour in zip(figures, itertools.cycle(("#d9822b", "#5b8c5a", "#8a5a9e")), strict=False):
        values = [record["figures"].get(key) for record in records]
        right.plot(epochs, [np.nan if v is None else v for v in values], "--", marker=".", label=key, color=colour)
    right.tick_params(labelsize=8)
    right.legend(fontsize=8, frameon=False)


def _drawn_columns(arrays: Sequence[np.ndarray], marked: Collection[int], most: int) -> list[int]:
    # A column that is important on either side is drawn, at its rank on the first side.
    largest = np.max([np.abs(array) for array in arrays], axis=0)
    order = sorted(range(len(largest)), key=lambda i: (i not in marked, -largest[i]))[: max(most, len(marked))]
    return sorted(order, key=lambda i: (-abs(arrays[0][i]), -largest[i]))


def _draw_bars(axes: Any, values: np.ndarray, span: tuple[float, float]) -> None:
    colours = np.where(values >= 0, "#2e6f9e", "#d9822b")
    axes.barh(range(len(values)), values, color=colours, height=0.72)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_xlim(*span)
    for place, value in enumerate(values):
        # Numbers are written outside the bars, at their ends.
        ahead = value >= 0
        axes.annotate(f"{value:.3g}", (value, place), xytext=(3 if ahead else -3, 0), textcoords="offset points",
                      ha="left" if ahead else "right", va="center", fontsize=7.5, color="#333333")  # fmt: skip
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors="#666666")
    axes.locator_params(axis="x", nbins=5)
    for spine in ("top", "right", "left"):
        axes.spines[spine].set_visible(False)


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def figure_bytes(figure: Any, kind: Literal["png", "svg", "pdf"] = "png") -> bytes:
    """A matplotlib figure as a file of that kind."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # No software or date in the file: the same run gives the same bytes.
    silent = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with rc_context({"svg.hashsalt": "robustexplain", "svg.fonttype": "none", "pdf.fonttype": 42}):
        # Tight: a slanted label on the last column would else be cut off.
        figure.savefig(buffer, format=kind, metadata=silent, bbox_inches="tight")
    return buffer.getvalue()


def _png(array: np.ndarray, side: int) -> bytes:
    from PIL import Image

    whole = Image.fromarray((np.clip(array, 0, 1) * 255).round().astype(np.uint8))
    scale = max(1, round(side / whole.height))
    buffer = io.BytesIO()
    whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
