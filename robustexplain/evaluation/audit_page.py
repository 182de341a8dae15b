"""The page of a run's manipulated systems: ``manipulations.html``, and their figures as ``manipulations.csv``."""

from __future__ import annotations

import base64
import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import files, pages, plots
from ..metrics import Fooling
from ..metrics.manipulation import CODE_THRESHOLD
from ..recipe.experiment import Experiment, Row
from .mending import damaged
from .store import RunFolder

PAGE, TABLE, PICTURE = "manipulations.html", "manipulations.csv", "manipulations.png"

FIGURES = {
    "fooled": "Fooling success rate",
    "answered": "Answers as the adversary wants",
    "ssim_goal": "SSIM to the map that is wanted",
    "ssim": "SSIM to the honest map",
    "spearman": "Rank correlation with the honest map",
    "sign_correlation": "Sign correlation with the honest map",
    "location": "Location correlation with the frame",
    "entropy": "Entropy of the map",
    "first": "Hidden column named first",
    "rank": "Rank of the hidden column",
    "test_loss": "Test loss of the fooling",
}
"""Figures of an audit in the order of the page; ``NAME_before`` is the honest model's."""


@dataclass(frozen=True)
class Audited:
    """The stored audit of one manipulated row.

    Args:
        row: the row.
        found: what :mod:`robustexplain.evaluation.audit` wrote.
        arrays: ``interpreter/view/name`` to a figure for each input, or what is shown of the first few.
        accuracy: of the honest and of the manipulated classifier on the test part; ``None`` if not measured yet.
    """

    row: Row
    found: dict[str, Any]
    arrays: dict[str, Tensor]
    accuracy: tuple[float, float] | None

    @property
    def looks(self) -> list[dict[str, Any]]:
        """The figures: a dictionary for each interpreter and view."""
        return [look for look in self.found["looks"] if "error" not in look]

    @property
    def headline(self) -> str:
        """The figure that measures best whether the manipulation succeeded."""
        known = self.looks[0]["figures"] if self.looks else {}
        wanted = (self.row.settings.headline, "fooled", "first", "ssim_goal", "spearman")
        return next((name for name in wanted if name in known), "answered")

    def shown(self, interpreter: str, name: str) -> float | None:
        """A figure of one interpreter: a success rate's mean over the views, another figure's last view."""
        looks = [look["figures"].get(name) for look in self.looks if look["interpreter"] == interpreter]
        known = [e["value"] for e in looks if e is not None and e["value"] is not None]
        if not known:
            return None
        return float(sum(known) / len(known) if name.startswith("fooled") else known[-1])

    def array(self, look: dict[str, Any], name: str) -> Tensor | None:
        """An array of a look."""
        return self.arrays.get(f"{look['interpreter']}/{look['view']}/{name}")


def read(recipe: Experiment, folder: RunFolder) -> list[Audited]:
    """All stored audits, in the recipe's order."""
    found = []
    for row in recipe.rows:
        path = folder.audit(row.label)
        if row.kind == "manipulation" and path.is_file() and not damaged(folder, path):
            costs = [folder.row(label) for label in (row.root, row.label)]
            accuracy = None
            if all(cost.is_file() and not damaged(folder, cost) for cost in costs):
                before, now = (folder.read_part(cost)["accuracy"] for cost in costs)
                accuracy = (before, now)
            known = folder.read_part(path)
            arrays = files.read_tensors(path.with_suffix(".safetensors"))[0]
            found.append(Audited(row, known, arrays, accuracy))
    return found


def write_audits(recipe: Experiment, folder: RunFolder, out: Path | None = None) -> Path | None:
    """Write page, table and picture into ``out`` (default the run's own directory); ``None`` without any audit."""
    out = out or folder.root
    found = read(recipe, folder)
    if not found:
        return None
    files.write_text(out / TABLE, table(found))
    drawn = transfers(recipe, found)
    files.replace_file(out / PICTURE, lambda aside: aside.write_bytes(drawn))
    return files.write_text(out / PAGE, html(recipe, found, drawn))


def table(found: list[Audited]) -> str:
    """Every estimate as CSV: a line a manipulation, interpreter, view and measure."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(["manipulation", "aimed_at", "interpreter", "view", "measure", "value", "low", "high", "count"])
    for audited in found:
        for look in audited.looks:
            where = [
                files.as_text(word) for word in (audited.row.label, audited.row.root, look["interpreter"], look["view"])
            ]
            for name, e in sorted(look["figures"].items()):
                numbers = ("" if e[key] is None else f"{e[key]:.6g}" for key in ("value", "low", "high"))
                out.writerow([*where, name, *numbers, e["count"]])
    return buffer.getvalue()


def transfers(recipe: Experiment, found: list[Audited]) -> bytes:
    """Manipulations against interpreters: each one's headline figure, before in brackets.

    A success rate is the mean over all views (both classes that are swapped), another figure that of the last view
    (the one with the trigger).
    """
    columns = [row.label for row in recipe.rows if not row.derived]
    values = np.full((len(found), len(columns)), np.nan)
    texts = [["-" for _ in columns] for _ in found]
    for i, audited in enumerate(found):
        for j, column in enumerate(columns):
            now, before = (audited.shown(column, key) for key in (audited.headline, f"{audited.headline}_before"))
            if now is not None:
                values[i, j] = now
                texts[i][j] = f"{now:.2f}" + ("" if before is None else f"\n({before:.2f})")
    # Shares are coloured by value; ranks and entropies, which have no common scale, relative to their line's largest.
    values /= np.maximum(np.nan_to_num(values).max(axis=1, keepdims=True), 1.0)
    labels = [f"{a.row.label}: {FIGURES[a.headline].lower()}" for a in found]
    return plots.matrix(labels, columns, values, texts, "neither")


def curve(history: dict[str, Any], budget: float | None) -> bytes:
    """Accuracy and fooling objective on the samples held out, by epoch; the epoch that was kept is marked."""
    from matplotlib.figure import Figure

    epochs = history["epochs"]
    figure = Figure(figsize=(5.2, 2.6), dpi=110, layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    left.plot([e["accuracy"] for e in epochs], color="#1f6fb4", marker="o", markersize=3)
    right.plot([e["fool"] for e in epochs], color="#b00020", marker="s", markersize=3)
    if budget is not None:
        left.axhline(epochs[0]["accuracy"] - budget, color="#1f6fb4", linewidth=0.8, linestyle=":")
    left.axvline(history["kept"], color="#888", linewidth=0.9, linestyle="--")
    left.set_xlabel("epoch (0: the honest weights; dashed: kept; dotted: budget)", fontsize=8)
    left.set_ylabel("accuracy", color="#1f6fb4", fontsize=9)
    right.set_ylabel("map objective", color="#b00020", fontsize=9)
    left.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
    return plots.figure_bytes(figure)


def distribution(metric: Fooling, before: Tensor, now: Tensor) -> bytes:
    """Test losses before and after as histograms; shaded is the range of success, dotted the code's threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    both = np.concatenate([t.numpy()[~np.isnan(t.numpy())] for t in (before, now)])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    bins = np.linspace(min(low, 0), max(high, 1e-6), 31)
    for values, colour, label in ((before, "#1f6fb4", "honest"), (now, "#b00020", "manipulated")):
        axes.hist(values.numpy(), bins=bins.tolist(), color=colour, alpha=0.6, label=label)
    axes.axvspan(metric.low, min(metric.high, bins[-1]), color="#2e7d32", alpha=0.12)
    axes.axvline(CODE_THRESHOLD, color="#444", linewidth=0.9, linestyle=":")
    axes.set_xlabel("test loss", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    return plots.figure_bytes(figure)


def html(recipe: Experiment, found: list[Audited], drawn: bytes) -> str:
    """The page as one file: pictures and script inside, nothing loaded from elsewhere."""
    return pages.render(
        "robustexplain.evaluation",
        "audit.html.j2",
        recipe=recipe,
        found=found,
        figures=FIGURES,
        things="rows" if any(a.found["features"] for a in found) else "images",
        transfers=_uri(drawn),
        curve=lambda a: _uri(curve(a.found["history"], getattr(a.row.settings, "budget", None))),
        losses=_losses,
        strips=_strips,
    )


def _losses(audited: Audited, look: dict[str, Any]) -> str | None:
    before, now = audited.array(look, "test_loss_before"), audited.array(look, "test_loss")
    metric: Fooling | None = audited.row.settings.fooled
    if before is None or now is None or metric is None:
        return None
    return _uri(distribution(metric, before, now))


def _strips(audited: Audited, look: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """For the first inputs of a look: captions and pictures, of the input, the honest map and the map now."""
    x, before, now = (audited.array(look, f"shown_{name}") for name in ("x", "before", "now"))
    if x is None or before is None or now is None:
        return []
    if x.dim() == 2:
        names = audited.found["features"] or [f"column {i}" for i in range(x.shape[1])]
        marked = [audited.found["hidden"]] if audited.found["hidden"] is not None else []
        drawn = (
            plots.bars(true, names, false, captions=("honest", "now"), marked=marked)
            for true, false in zip(before, now, strict=True)
        )
        return [[("attributions of one row", _uri(bars))] for bars in drawn]
    return [
        [
            ("input", _uri(plots.picture(image))),
            ("honest", _uri(plots.heat_map(honest))),
            ("now", _uri(plots.heat_map(false))),
        ]
        for image, honest, false in zip(x, before, now, strict=True)
    ]


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
