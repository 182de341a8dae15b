"""Small drawings of the report as inline SVG in its colours: distributions, ROC curves, curves, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from torch import Tensor

BINS = 24
SERIES = 8
"""How many colours lines take turns in."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        label: of the legend.
        points: ``(x, value, low, high)``.
        doubted: for each point, whether it is in doubt: it is drawn hollow.
        each: for each point, the value of each seed, drawn as small dots.
    """

    label: str
    points: Sequence[tuple[float, float, float, float]]
    doubted: Sequence[bool] = ()
    each: Sequence[Sequence[float]] = ()


def bar(value: float, low: float, high: float, each: Sequence[float | None] = ()) -> Markup:
    """A share as a bar with its 95% interval as a line, and a dot for the share of each seed."""
    return _rail(f'<i class="fill" style="width:{100 * value:.1f}%"></i>', low, high, each, (0.0, 1.0))


def dots(value: float, low: float, high: float, each: Sequence[float | None]) -> Markup:
    """A measure's 95% interval as a line, and a dot for the value of each seed; shares on a scale from 0 to 1."""
    known = [value, low, high, *(one for one in each if one is not None)]
    unit = min(known) >= 0 and max(known) <= 1
    return _rail("", low, high, each, (0.0, 1.0) if unit else (min(known), max(known)))


def _rail(inside: str, low: float, high: float, each: Sequence[float | None], ends: tuple[float, float]) -> Markup:
    # No SVG: its dots would be as stretched as the cell is wide.
    def at(place: float) -> float:
        return 100 * (place - ends[0]) / ((ends[1] - ends[0]) or 1.0)

    known = [one for one in each if one is not None]
    words = f' title="each training: {", ".join(f"{one:.3g}" for one in known)}"' if known else ""
    line = f'<i class="whisker" style="left:{at(low):.1f}%;width:{at(high) - at(low):.1f}%"></i>'
    marks = "".join(f'<i class="seed" style="left:{at(one):.1f}%"></i>' for one in known)
    return Markup(f'<span class="bar"{words}>{inside}{line}{marks}</span>')


def distributions(harmless: Tensor, attacked: Tensor, limit: float | None, what: str) -> Markup:
    """Shares of distances in common bins: harmless changes upwards, attacked inputs over them, the limit dashed."""
    both = np.concatenate([harmless.double().numpy(), attacked.double().numpy()])
    both = both[np.isfinite(both)]
    if not len(both):
        return Markup("")
    top = float(np.quantile(both, 0.995)) * 1.08 if both.max() > 0 else 1.0
    top = max(top, float(limit or 0) * 1.15, 1e-9)
    bottom = min(0.0, float(both.min()))
    edges = np.linspace(bottom, top, BINS + 1)
    shares = [
        np.histogram(np.clip(v.double().numpy(), bottom, top), edges)[0] / max(len(v), 1) for v in (harmless, attacked)
    ]
    peak = max(float(np.max(shares)), 1e-9)
    parts = []
    for kind, values in zip(("harm", "att"), shares, strict=True):
        for i, value in enumerate(values):
            if value:
                height, width = 84 * float(value) / peak, 220 / BINS
                x = 10 + width * i
                box = f'x="{x:.1f}" y="{92 - height:.1f}" width="{width - 0.6:.1f}" height="{height:.1f}"'
                parts.append(f'<rect class="{kind}" {box}/>')
    if limit is not None and math.isfinite(limit):
        x = 10 + 220 * (limit - bottom) / (top - bottom)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="92"/>')
    parts.append('<line class="axis" x1="10" x2="230" y1="92" y2="92"/>')
    parts.append(f'<text x="10" y="104">{bottom:.3g}</text><text x="230" y="104" text-anchor="end">{top:.3g}</text>')
    parts.append(f'<text x="120" y="104" text-anchor="middle">{escape(what)}</text>')
    return _svg("chart", 240, 108, parts, f"distribution of {what}, attacked against harmless")


def roc(curves: Sequence[tuple[str, Tensor, Tensor]]) -> Markup:
    """ROC curves: the share of attacked inputs above a threshold against that of harmless ones.

    Args:
        curves: the legend's word, numbers of harmless inputs, numbers of attacked ones.
    """
    parts = [
        '<rect class="frame" x="14" y="6" width="86" height="86"/><line class="limit" x1="14" y1="92" x2="100" y2="6"/>'
    ]
    for i, (label, harmless, attacked) in enumerate(curves):
        points = " ".join(f"{14 + 86 * x:.1f},{92 - 86 * y:.1f}" for x, y in roc_points(harmless, attacked))
        parts.append(f'<polyline class="line s{i}" points="{points}"/>')
        parts.append(f'<text class="s{i}t" x="98" y="{80 - 11 * i}" text-anchor="end">{escape(label)}</text>')
    parts.append('<text x="57" y="104" text-anchor="middle">harmless</text>')
    parts.append('<text x="10" y="50" transform="rotate(-90 10 50)" text-anchor="middle">attacked</text>')
    return _svg("chart roc", 106, 108, parts, "ROC curve")


def roc_points(harmless: Tensor, attacked: Tensor, most: int = 60) -> list[tuple[float, float]]:
    """Points ``(false, true)`` of a ROC curve from (0, 0) to (1, 1), at most so many inner ones."""
    negative, positive = np.sort(harmless.double().numpy()), np.sort(attacked.double().numpy())
    cuts = np.unique(np.concatenate([negative, positive]))[::-1]
    if len(cuts) > most:
        cuts = cuts[np.linspace(0, len(cuts) - 1, most).round().astype(int)]
    x = 1 - np.searchsorted(negative, cuts, side="left") / max(len(negative), 1)
    y = 1 - np.searchsorted(positive, cuts, side="left") / max(len(positive), 1)
    return [(0.0, 0.0), *zip(x.tolist(), y.tolist(), strict=True), (1.0, 1.0)]


def chart(lines: Sequence[Line], ticks: Sequence[tuple[float, str]], across: str, up: str) -> Markup:
    """Lines with 95% bands over a setting, values in ``[0, 1]``; a point in doubt is hollow.

    Args:
        lines: at least one.
        ticks: of the setting: where, and what is written there.
        across: the setting's name.
        up: the measure's name.
    """
    left, right, bottom, top = 40, 330, 200, 12
    places = [tick for tick, _ in ticks]
    first, span = min(places), (max(places) - min(places)) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (x - first) / span, bottom - (bottom - top) * y

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = at(first, share)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 3:.1f}" text-anchor="end">{share:g}</text>')
    for place, words in ticks:
        parts.append(f'<text x="{at(place, 0)[0]:.1f}" y="{bottom + 13}" text-anchor="middle">{escape(words)}</text>')
    for i, line in enumerate(lines):
        parts += _line(line, i % SERIES, at)
        parts.append(f'<line class="line s{i % SERIES}" x1="345" x2="362" y1="{18 + 15 * i}" y2="{18 + 15 * i}"/>')
        parts.append(f'<text x="367" y="{21 + 15 * i}">{escape(line.label)}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 28}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text x="10" y="106" transform="rotate(-90 10 106)" text-anchor="middle">{escape(up)}</text>')
    return _svg("chart wide", 560, max(235, 30 + 15 * len(lines)), parts, f"{up} over {across}")


def _line(line: Line, colour: int, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    points = [place(x, y) for x, y, _, _ in line.points]
    ends = [place(x, high) for x, _, _, high in line.points]
    ends += [place(x, low) for x, _, low, _ in reversed(line.points)]
    joined = [" ".join(f"{x:.1f},{y:.1f}" for x, y in some) for some in (ends, points)]
    parts = [
        f'<polygon class="band s{colour}f" points="{joined[0]}"/>',
        f'<polyline class="line s{colour}" points="{joined[1]}"/>',
    ]
    for (x, *_), values in zip(line.points, line.each, strict=False):
        spots = (place(x, value) for value in values)
        parts += [f'<circle class="each s{colour}f" cx="{x:.1f}" cy="{y:.1f}" r="1.6"/>' for x, y in spots]
    doubted = line.doubted or [False] * len(points)
    for (x, y), hollow in zip(points, doubted, strict=True):
        kind = f"hollow s{colour}" if hollow else f"dot s{colour}f"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return parts


def _svg(kind: str, width: int, height: int, parts: Sequence[str], title: str) -> Markup:
    inside = "".join(parts)
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{inside}</svg>'
    )
