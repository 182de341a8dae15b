"""The page of a run's scans: ``scans.html``, the AUC over models as ``scans.png``, every figure as ``scans.csv``."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Literal

import numpy as np

from .. import files, pages, plots
from ..recipe.experiment import Recipe
from .scan_results import TABLE, Finding, Kind, as_csv, read_results
from .store import RunFolder

PAGE, PICTURE = "scans.html", "scans.png"

COLOURS: dict[Kind, str] = {"honest": "#1f6fb4", "control": "#6b7280", "suspect": "#b00020"}


def write_scans(recipe: Recipe, folder: RunFolder) -> Path | None:
    """Write table, picture and page of the stored scans; only the table while no manipulated model was scanned."""
    found = read_results(recipe, folder)
    files.write_text(folder.root / TABLE, as_csv(found))
    if not any(f.auc is not None for f in found):
        return None
    drawn = {"areas": areas(found), "scores": scores(found)}
    files.replace_file(folder.root / PICTURE, lambda aside: aside.write_bytes(drawn["areas"]))
    if any(f.against_controls is not None for f in found):
        drawn["against"] = areas(found, "against_controls")
    pictures = {name: f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for name, png in drawn.items()}
    shown = {"against": None, **pictures}
    page = pages.render("robustexplain.evaluation", "scans.html.j2", recipe=recipe, found=found, **shown)
    return files.write_text(folder.root / PAGE, page)


def _labels(found: list[Finding]) -> tuple[list[str], list[str]]:
    """Rows and scanners, each once and in order."""
    return list(dict.fromkeys(f.row for f in found)), list(dict.fromkeys(f.scanner for f in found))


def areas(found: list[Finding], of: Literal["auc", "against_controls"] = "auc") -> bytes:
    """AUC over models of each scanner against each row that has one, as PNG."""
    known = {(f.row, f.scanner): area for f in found if (area := getattr(f, of)) is not None}
    rows, scanners = _labels([f for f in found if (f.row, f.scanner) in known])
    values = np.full((len(rows), len(scanners)), np.nan)
    texts = [["-" for _ in scanners] for _ in rows]
    for (row, scanner), area in known.items():
        i, j = rows.index(row), scanners.index(scanner)
        values[i, j] = area.value
        texts[i][j] = f"{area.value:.2f}\n{area.low:.2f}-{area.high:.2f}"
    return plots.matrix(rows, scanners, values, texts, "high")


def scores(found: list[Finding]) -> bytes:
    """The score of every model, a dot each and a panel a scanner, beside the range of the honest ones, as PNG."""
    from matplotlib.figure import Figure

    rows, scanners = _labels(found)
    size = (1.4 + 2.6 * len(scanners), 1.0 + 0.28 * len(rows))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(scanners), sharey=True))
    for axes, scanner in zip(panels, scanners, strict=True):
        for f in (f for f in found if f.scanner == scanner):
            y = rows.index(f.row)
            axes.plot([min(f.honest), max(f.honest)], [y, y], color=COLOURS["honest"], linewidth=7, alpha=0.22)
            axes.plot(f.scores, [y] * len(f.scores), "o", ms=4, alpha=0.7, color=COLOURS[f.kind])
        axes.set_title(scanner, fontsize=9)
        axes.set_xlabel("score", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", color="#e5e8eb", linewidth=0.6)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8)
    return plots.figure_bytes(figure)
