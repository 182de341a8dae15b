"""From a run directory's cells to ``report.html`` (one self-contained file), ``matrix.csv`` and ``matrix.png``."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import files, plots, training
from .audit_page import write_audits
from .notes import notes
from .results import Results
from .store import LABEL, MATRIX, REPORT, RunFolder
from .words import Words

PICTURE = "matrix.png"
SANITY = "sanity.png"
"""The picture that ``robustexplain sanity`` writes into the same directory."""


def write_report(folder: RunFolder, out: Path | None = None) -> Path:
    """Write the report, the table and the picture of a run; cells that are not finished, or damaged, stay empty.

    Args:
        folder: the run.
        out: where they are written; default the run's own directory.
    """
    results, out = Results.read(folder), out or folder.root
    files.write_text(out / MATRIX, table(results))
    main = matrix_picture(results, results.main)
    files.replace_file(out / PICTURE, lambda aside: aside.write_bytes(main))
    audits = write_audits(results.experiment, folder, out)
    return files.write_text(out / REPORT, html(results, folder, main, audits))


def table(results: Results) -> str:
    """The matrix as CSV: a line for each row, column and measure."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(["row", "base", "column", "knowledge", "measure", "value", "low", "high", "count"])
    for row in results.experiment.rows:
        for column in results.experiment.columns:
            cell = results.cells[row.label, column.label]
            where = [*map(files.as_text, (row.label, row.base, column.label)), column.knowledge]
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
    rows, columns = [r.label for r in results.experiment.rows], [c.label for c in results.experiment.columns]
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
    return plots.matrix(rows, columns, values, texts, results.words[name].good)


def html(results: Results, folder: RunFolder, main: bytes, audits: Path | None = None) -> str:
    """The whole report as one HTML file: pictures inside, no scripts, nothing loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("robustexplain.evaluation", "."), autoescape=True)
    return environment.get_template("report.html.j2").render(
        recipe=results.experiment,
        run=results.run,
        results=results,
        measures=_shown(results),
        main=_embed(main),
        distance=_embed(matrix_picture(results, "l1")) if results.has("l1") else None,
        sanity=_embed((folder.root / SANITY).read_bytes()) if (folder.root / SANITY).is_file() else None,
        curves=_learning_curves(results, folder),
        strips=_strips(results, folder),
        failures=[cell for cell in results.cells.values() if cell and cell["status"] != "done"],
        missing=[where for where, cell in results.cells.items() if cell is None],
        notes=notes(results),
        colour=_colour,
        count=results.judged,
        things=results.things,
        audits=None if audits is None else audits.name,
        explaining=any(column.facts.keeps_prediction for column in results.experiment.columns),
    )


def _shown(results: Results) -> dict[str, Words]:
    """The measures with a table of their own: those of inputs that are right only where they differ from all."""
    hidden = {f"{name}_correct" for name in ("joint", "success") if not results.differs(f"{name}_correct", name)}
    return {name: words for name, words in results.words.items() if results.has(name) and name not in hidden}


def _learning_curves(results: Results, folder: RunFolder) -> str | None:
    """The histories of the trainings of the run's rows as a picture; ``None`` if there are none."""
    found = training.histories(folder.training) if folder.training.is_dir() else {}
    rows = {row.label for row in results.experiment.rows}
    found = {name: epochs for name, epochs in found.items() if _owners(folder, name) <= rows}
    if not found:
        return None
    return _embed(plots.learning_curves({_training_name(folder, name): epochs for name, epochs in found.items()}))


def _owners(folder: RunFolder, name: str) -> set[str]:
    """The labels of the rows that a training belongs to."""
    places = [folder.training / part for part in Path(name).parents]
    return {(p / LABEL).read_text(encoding="utf-8", errors="replace") for p in places if (p / LABEL).is_file()}


def _training_name(folder: RunFolder, name: str) -> str:
    """A training by the labels of the rows that it belongs to, instead of by its folder."""
    *inside, own = name.split("/")
    words, path = [], folder.training
    for part in inside:
        path = path / part
        words.append((path / LABEL).read_text(encoding="utf-8") if (path / LABEL).is_file() else part)
    return ": ".join(words if words and words[-1] == own else [*words, own])


def print_matrix(results: Results) -> None:
    """The joint-success matrix on the terminal."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{results.experiment.name}: joint success, {results.judged} {results.things}")
    shown.add_column("")
    for column in results.experiment.columns:
        shown.add_column(column.label, justify="right")
    for row in results.experiment.rows:
        found = [results.measure(row.label, column.label, results.main) for column in results.experiment.columns]
        shown.add_row(row.label, *("-" if e is None else f"{e['value']:.2f}" for e in found))
    # Labels are the user's text, not rich's markup.
    console = Console(markup=False, emoji=False)
    (console if console.is_terminal else Console(width=150, markup=False, emoji=False)).print(shown)


def _strips(results: Results, folder: RunFolder) -> list[dict[str, Any]]:
    """Benign and attacked images and maps of every cell; those of the strongest adversaries are unfolded."""
    about_maps = [c for c in results.experiment.columns if c.facts.needs_maps]
    adaptive = [c for c in about_maps if c.knowledge == "adaptive"]
    looked_at = {c.label for c in adaptive or about_maps or results.experiment.columns}
    strips = []
    for (row, column), cell in results.cells.items():
        if cell is None or cell["status"] != "done":
            continue
        arrays = folder.arrays(row, column)
        names = results.run.get("features", [])
        shown = min(len(arrays["x"]), results.experiment.evaluation.pictures)
        images = [_images(arrays, i, names) for i in range(shown)]
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
