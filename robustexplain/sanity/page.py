"""The results of the sanity checks: ``sanity.csv``, ``sanity.png`` and ``sanity.html``."""

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
from ..evaluation.report import SANITY, write_report
from ..evaluation.statistics import Estimate, bootstrap
from ..evaluation.store import REPORT, RunFolder
from ..recipe.experiment import Recipe
from .checks import CHECKS

TABLE, PAGE = "sanity.csv", "sanity.html"


@dataclass(frozen=True)
class CheckResult:
    """The stored result of one check of one interpreter.

    Args:
        row: label of the interpreter.
        check: which check.
        status: ``done``, ``unsupported`` or ``failed``.
        note: why it is not done, or a remark.
        layers: the layer of each stage.
        curves: by measure, an estimate a stage.
        maps: by stage, the maps of the first images.
        x: those images.
    """

    row: str
    check: str
    status: str
    note: str
    layers: list[str]
    curves: dict[str, list[Estimate]]
    maps: list[Tensor]
    x: Tensor | None

    def last(self, measure: str) -> Estimate:
        """The estimate at the end of the check."""
        return self.curves[measure][-1]


def read_results(recipe: Recipe, folder: RunFolder) -> list[CheckResult]:
    """The results of all checks that were made, in the recipe's order."""
    found = []
    for check in CHECKS:
        for row in recipe.rows:
            path = folder.sanity(row.label, check)
            if path.is_file():
                found.append(_read(folder, path, recipe.evaluation.bootstrap))
    return found


def _read(folder: RunFolder, path: Path, resamples: int) -> CheckResult:
    known = folder.read_part(path)
    arrays = files.read_tensors(path.with_suffix(".safetensors"))[0] if known["stages"] else {}
    numbers = [stage["stage"] for stage in known["stages"]]
    measures = [name.split("/", 1)[1] for name in arrays if name.startswith(f"{numbers[0]}/")] if numbers else []
    curves = {
        name: [bootstrap(arrays[f"{n}/{name}"], resamples) for n in numbers] for name in measures if name != "maps"
    }
    maps = [arrays[f"{n}/maps"] for n in numbers]
    layers = [stage["layer"] for stage in known["stages"]]
    row, check, status, note = (known[key] for key in ("row", "check", "status", "note"))
    return CheckResult(row, check, status, note, layers, curves, maps, arrays.get("x"))


def write_page(recipe: Recipe, folder: RunFolder) -> Path:
    """Write the table, the picture of the curves and the page of a run's sanity checks."""
    found = read_results(recipe, folder)
    files.write_text(folder.root / TABLE, table(found))
    curves = [f for f in found if f.check == "cascading" and f.status == "done"]
    if curves:
        drawn = curves_picture(curves)
        files.replace_file(folder.root / SANITY, lambda aside: aside.write_bytes(drawn))
    page = files.write_text(folder.root / PAGE, html(recipe, found))
    if (folder.root / REPORT).is_file():
        # The matrix was judged before: its report shows the curves from now on.
        write_report(folder)
    return page


def table(found: list[CheckResult]) -> str:
    """Every estimate as CSV: a line an interpreter, check, stage and measure."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(["interpreter", "check", "stage", "layer", "measure", "value", "low", "high", "count"])
    for f in found:
        if f.status != "done":
            out.writerow([files.as_text(f.row), f.check, "", "", "status", f.status, "", "", ""])
        for name, curve in sorted(f.curves.items()):
            for stage, (layer, e) in enumerate(zip(f.layers, curve, strict=True)):
                numbers = ("" if v is None else f"{v:.6g}" for v in (e.value, e.low, e.high))
                out.writerow([files.as_text(f.row), f.check, stage, layer, name, *numbers, e.count])
    return buffer.getvalue()


def curves_picture(found: list[CheckResult]) -> bytes:
    """A panel an interpreter: each measure against how far down the network is random."""
    from matplotlib.figure import Figure

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.3, 2.5 * rows + 0.9), dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).flatten()
    for axes, f in zip(panels, found, strict=False):
        for name, curve in sorted(f.curves.items()):
            values, lows, highs = (
                np.array([np.nan if getattr(e, key) is None else getattr(e, key) for e in curve], dtype=float)
                for key in ("value", "low", "high")
            )
            (line,) = axes.plot(values, marker="o", markersize=2.5, linewidth=1.3, label=name)
            axes.fill_between(range(len(values)), lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_title(f.row, fontsize=10)
        axes.set_ylim(-0.3, 1.05)
        axes.axhline(0, color="#999", linewidth=0.7)
        axes.tick_params(labelsize=7)
        labels = [".".join(layer.split(".")[-2:]) for layer in f.layers]
        axes.set_xticks(range(len(f.layers)), ["trained", *labels[1:]], rotation=60, ha="right", fontsize=6)
    for axes in panels[len(found) :]:
        axes.axis("off")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return plots.figure_bytes(figure)


def maps_picture(found: list[CheckResult], image: int) -> bytes:
    """A line an interpreter: the map of one image as ever more of the network is random."""
    from matplotlib.figure import Figure

    columns = 1 + max(len(f.maps) for f in found)
    figure = Figure(figsize=(1.05 * columns, 1.15 * len(found) + 0.5), dpi=100, layout="constrained")
    panels = figure.subplots(len(found), columns, squeeze=False)
    for line, f in zip(panels, found, strict=True):
        assert f.x is not None
        line[0].imshow(f.x[image].permute(1, 2, 0).expand(-1, -1, 3).numpy())
        line[0].set_ylabel(f.row, fontsize=7)
        for axes, maps in zip(line[1:], f.maps, strict=False):
            axes.imshow(plots.coloured(plots.magnitudes(maps[image])))
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, layer in zip(panels[0][1:], ["trained", *found[0].layers[1:]], strict=False):
        axes.set_title(layer.removeprefix("net."), fontsize=6)
    return plots.figure_bytes(figure)


def html(recipe: Recipe, found: list[CheckResult]) -> str:
    """The page."""
    by_check: dict[str, list[CheckResult]] = {}
    for f in found:
        by_check.setdefault(f.check, []).append(f)
    done = {check: [f for f in group if f.status == "done"] for check, group in by_check.items()}
    count = max((len(f.maps[0]) for f in done.get("cascading", [])), default=0)
    images = [_uri(maps_picture(done["cascading"], i)) for i in range(count)]
    drawn = {check: _uri(curves_picture(done[check])) for check in ("cascading", "independent") if done.get(check)}
    context: dict[str, Any] = {"recipe": recipe, "checks": by_check, "done": done, "curves": drawn, "images": images}
    return pages.render("robustexplain.sanity", "sanity.html.j2", **context, half=_half)


def _half(found: CheckResult, measure: str) -> Estimate:
    """The estimate when the upper half of the network is random."""
    curve = found.curves[measure]
    return curve[len(curve) // 2]


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
