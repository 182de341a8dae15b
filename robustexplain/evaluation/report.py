"""From a run directory's cells to ``report.html`` (one self-contained file), ``matrix.csv`` and ``matrix.png``."""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import files, plots
from ..metrics import MapMetric, Metric
from ..recipe import check
from ..recipe.experiment import Recipe
from ..registry import METRICS
from .audit_page import PAGE, write_audits
from .store import MATRIX, RECIPE, REPORT, RUN, RunFolder

PICTURE = "matrix.png"
SANITY = "sanity.png"
"""What ``robustexplain sanity`` leaves in the same directory."""

MEASURES = {
    "joint": ("Joint success", "predicted as wanted, plausible map, no alarm: what a defender fears", "low"),
    "success": ("Attack success (ASR)", "predicted as the adversary wants", "low"),
    "confidence": ("Misclassification confidence (MC)", "probability of the class that the adversary wants", "low"),
    "plausible": ("Plausible map", "IoU with the goal map above the threshold", "low"),
    "queries": ("Queries", "inputs that the attack showed to the system", "neither"),
    "alarm": ("Detection rate", "share of inputs that raise the calibrated alarm", "high"),
    "auc": ("Area under the detector's ROC curve", "chance that an attacked input scores above a clean one", "high"),
    "l1": (
        "L1 to the benign map",
        "mean absolute difference of min-max rescaled maps; high exposes a forgery",
        "neither",
    ),
    "l2": ("L2 to the benign map", "root mean square difference of min-max rescaled maps", "neither"),
    "iou": ("IoU with the benign map", "of the rescaled maps, binarised", "neither"),
}


@dataclass(frozen=True)
class Results:
    """Everything that the report shows, read from the run directory.

    Args:
        recipe: the experiment.
        run: identity and library versions.
        cells: by row label and column label; a missing cell is ``None``.
        rows: cost of each row, by label.
    """

    recipe: Recipe
    run: dict[str, Any]
    cells: dict[tuple[str, str], dict[str, Any] | None]
    rows: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: RunFolder) -> Results:
        """Read the results of a run, finished or not."""
        import yaml

        recipe = check(yaml.safe_load((folder.root / RECIPE).read_text(encoding="utf-8")))
        run = json.loads((folder.root / RUN).read_text(encoding="utf-8"))
        cells = {(r.label, c.label): folder.read_cell(r.label, c.label) for r in recipe.rows for c in recipe.columns}
        costs = {r.label: folder.row(r.label) for r in recipe.rows}
        read = {label: json.loads(path.read_text(encoding="utf-8")) for label, path in costs.items() if path.is_file()}
        return cls(recipe, run, cells, read)

    def measure(self, row: str, column: str, name: str) -> dict[str, Any] | None:
        """One estimate, or ``None`` where the cell or the measure is not there."""
        cell = self.cells.get((row, column))
        found = cell.get("measures", {}).get(name) if cell and cell["status"] == "done" else None
        return found if found and found["value"] is not None else None

    def has(self, name: str) -> bool:
        """Whether any cell reports this measure."""
        return any(cell and name in cell.get("measures", {}) for cell in self.cells.values())


def write_report(folder: RunFolder) -> Path:
    """Write the report, the table and the picture of a run; what is not finished is shown as a hole."""
    results = Results.read(folder)
    files.write_text(folder.root / MATRIX, table(results))
    main = matrix_picture(results, "joint")
    files.replace_file(folder.root / PICTURE, lambda aside: aside.write_bytes(main))
    write_audits(results.recipe, folder)
    return files.write_text(folder.root / REPORT, html(results, folder, main))


def table(results: Results) -> str:
    """The matrix as CSV: a line for each row, column and measure."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(["row", "base", "column", "knowledge", "measure", "value", "low", "high", "count"])
    for row in results.recipe.rows:
        for column in results.recipe.columns:
            cell = results.cells[row.label, column.label]
            where = [row.label, row.base, column.label, column.knowledge]
            if cell is None or cell["status"] != "done":
                out.writerow([*where, "status", cell["status"] if cell else "missing", "", "", ""])
                continue
            measured = dict(cell["measures"])
            measured |= {f"{name}_on_successes": e for name, e in cell["on_successes"].items()}
            measured |= {f"{name}_minus_undefended": e for name, e in cell["against_undefended"].items()}
            for name, e in measured.items():
                out.writerow([*where, name, *(_number(e[key]) for key in ("value", "low", "high", "count"))])
    return buffer.getvalue()


def matrix_picture(results: Results, name: str) -> bytes:
    """One measure over all cells as a coloured picture, each with its 95% interval."""
    rows, columns = [r.label for r in results.recipe.rows], [c.label for c in results.recipe.columns]
    values = np.full((len(rows), len(columns)), np.nan)
    texts = [["" for _ in columns] for _ in rows]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            found = results.measure(row, column, name)
            cell = results.cells[row, column]
            texts[i][j] = "failed" if cell and cell["status"] != "done" else "-"
            if found:
                values[i, j] = found["value"]
                texts[i][j] = f"{found['value']:.2f}\n[{found['low']:.2f}, {found['high']:.2f}]"
    return plots.matrix(rows, columns, values, texts, MEASURES[name][2])


def html(results: Results, folder: RunFolder, main: bytes) -> str:
    """The whole report as one HTML file: pictures inside, no scripts, nothing loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("robustexplain.evaluation", "."), autoescape=True)
    known = MEASURES | {name: _described(name, m) for name, m in results.recipe.metrics.items() if name not in MEASURES}
    known |= {name: words for metric in results.recipe.metrics for name, words in _other_maps(metric, known).items()}
    return environment.get_template("report.html.j2").render(
        recipe=results.recipe,
        run=results.run,
        results=results,
        measures={name: words for name, words in known.items() if results.has(name)},
        main=_embed(main),
        distance=_embed(matrix_picture(results, "l1")) if results.has("l1") else None,
        sanity=_embed((folder.root / SANITY).read_bytes()) if (folder.root / SANITY).is_file() else None,
        strips=_strips(results, folder),
        failures=[cell for cell in results.cells.values() if cell and cell["status"] != "done"],
        missing=[where for where, cell in results.cells.items() if cell is None],
        notes=notes(results),
        colour=_colour,
        count=_judged(results),
        things=_things(results),
        audits=PAGE if (folder.root / PAGE).is_file() else None,
        explaining=any(column.attack.keeps_prediction for column in results.recipe.columns),
    )


def _other_maps(name: str, known: dict[str, tuple[str, str, str]]) -> dict[str, tuple[str, str, str]]:
    """The words for a metric taken to another map than the benign one."""
    short = known[name][0].partition(" ")[0]
    return {
        f"{name}_goal": (f"{short} to the goal map", "where the adversary asked for a map of its own", "neither"),
        f"{name}_nearer": (f"Nearer to the goal map, by {short}", "share nearer than to the benign map", "low"),
        f"{name}_honest": (
            f"{known[name][0]}, of the honest system",
            "against the map of the system before",
            "neither",
        ),
    }


def _described(name: str, metric: Metric) -> tuple[str, str, str]:
    """The words for a metric that the report does not know by heart, such as a third party's."""
    summary = METRICS.get(name).summary.rstrip(".")
    if isinstance(metric, MapMetric):
        return name, f"{summary}; against the benign map", "low" if metric.higher_is_closer else "high"
    return name, f"{summary}; {metric.better} speaks for the explanation", "neither"


def notes(results: Results) -> list[str]:
    """What the figures themselves give reason to doubt."""
    said = []
    for (row, column), cell in results.cells.items():
        said += _silent(results, row, column)
        if cell and cell.get("knowledge") == "adaptive" and cell["status"] == "done":
            said += _weaker(results, row, column)
    return said + _noise(results)


SILENT = {
    "zero_direction": "the search found no direction to go in",
    "stalled": "the search never got its objective below where it began",
    "surrogate_misled": "the stand-in that the search followed improved and the real system did not",
}


def _silent(results: Results, row: str, column: str) -> list[str]:
    """What a search says of its own failure; an attack that fails in silence looks like robustness."""
    said = []
    for name, words in SILENT.items():
        found = results.measure(row, column, name)
        if found and found["value"] > 0:
            said.append(
                f"{row} / {column}: {words} for {found['value']:.0%} of the {_things(results)}; "
                "a weak attack here says nothing about the defense"
            )
    return said


def _weaker(results: Results, row: str, column: str) -> list[str]:
    """An attacker who knows the defense and does worse than one who ignores it has not been tried hard enough."""
    adapts = results.measure(row, column, "joint")
    for other in results.recipe.columns:
        ignores = results.measure(row, other.label, "joint")
        if other.knowledge == "adaptive" or adapts is None or ignores is None:
            continue
        if ignores["low"] > adapts["high"]:
            return [
                f"{row}: {other.label!r} ({ignores['value']:.2f}) does better than {column!r} "
                f"({adapts['value']:.2f}): the adaptive attack is not the strongest one here, so trust the worse figure"
            ]
    return []


def _noise(results: Results) -> list[str]:
    """A control that does as well as an attack shows a brittle system, or an attack that does nothing."""
    said = []
    columns = [column for column in results.recipe.columns if not column.attack.keeps_prediction]
    noise = [column.label for column in columns if column.attack.control]
    others = [column.label for column in columns if not column.attack.control]
    for row in results.recipe.rows:
        for quiet in noise:
            control = results.measure(row.label, quiet, "success")
            for other in others:
                attack = results.measure(row.label, other, "success")
                if control and attack and control["value"] > 0 and attack["high"] <= control["low"]:
                    said.append(f"{row.label}: {quiet!r}, a control, misleads the classifier as often as {other!r}")
    return said


def print_matrix(root: Path) -> None:
    """The joint-success matrix on the terminal."""
    from rich.console import Console
    from rich.table import Table

    results = Results.read(RunFolder(root))
    shown = Table(title=f"{results.recipe.name}: joint success, {_judged(results)} {_things(results)}")
    shown.add_column("")
    for column in results.recipe.columns:
        shown.add_column(column.label, justify="right")
    for row in results.recipe.rows:
        found = [results.measure(row.label, column.label, "joint") for column in results.recipe.columns]
        shown.add_row(row.label, *("-" if e is None else f"{e['value']:.2f}" for e in found))
    # Labels are the user's text, not rich's markup.
    console = Console(markup=False, emoji=False)
    (console if console.is_terminal else Console(width=150, markup=False, emoji=False)).print(shown)


def _strips(results: Results, folder: RunFolder) -> list[dict[str, Any]]:
    """Benign and attacked images and maps of every cell; those of the strongest adversaries are unfolded."""
    about_maps = [c for c in results.recipe.columns if c.attack.needs_maps]
    adaptive = [c for c in about_maps if c.knowledge == "adaptive"]
    looked_at = {c.label for c in adaptive or about_maps or results.recipe.columns}
    strips = []
    for (row, column), cell in results.cells.items():
        if cell is None or cell["status"] != "done":
            continue
        arrays = folder.arrays(row, column)
        names = results.run.get("features", [])
        images = [_images(arrays, i, names) for i in range(len(arrays["x"]))]
        strips.append({"row": row, "column": column, "images": images, "open": column in looked_at})
    return strips


def _images(arrays: dict[str, Tensor], i: int, names: list[str]) -> dict[str, Any]:
    label, prediction = int(arrays["label"][i]), int(arrays["prediction"][i])
    return {
        "panels": [_embed(panel) for panel in _panels(arrays, i, names)],
        "table": arrays["x"].dim() == 2,
        "caption": f"{label} → {prediction}",
        "l1": float(arrays["l1"][i]) if "l1" in arrays else None,
        "joint": bool(arrays["joint"][i]),
    }


def _panels(arrays: dict[str, Tensor], i: int, names: list[str]) -> list[bytes]:
    """Images and maps, benign and attacked, and a goal map that was given; of a table's row, the bars of its map."""
    x, attacked = arrays["x"][i], arrays["attacked_x"][i]
    if x.dim() == 1:
        return [plots.bars(arrays["attacked_map"][i], names or [f"column {j}" for j in range(len(x))])]
    return [
        plots.picture(x),
        plots.picture(attacked),
        plots.perturbation(x, attacked),
        plots.heat_map(arrays["map"][i]),
        *(plots.heat_map(arrays[name][i]) for name in ("attacked_map", "goal_map") if name in arrays),
    ]


def _things(results: Results) -> str:
    return "rows" if results.run.get("features") else "images"


def _judged(results: Results) -> int:
    counts = [cell["measures"]["success"]["count"] for cell in results.cells.values() if cell and "measures" in cell]
    return max(counts, default=0)


def _colour(estimate: dict[str, Any] | None, good: str) -> str:
    if estimate is None:
        return "#eee"
    share = min(max(estimate["value"], 0.0), 1.0)
    if good == "neither":
        return f"hsl(210, 60%, {97 - 32 * share:.0f}%)"
    hue = 120 * (share if good == "high" else 1 - share)
    return f"hsl({hue:.0f}, 65%, 80%)"


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.9g}"
