"""From a run directory's cells to ``report.html`` (one self-contained file), its tables and its figures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import files, pages, plots, training
from . import audit_page, exports
from .audit_page import write_audits
from .doubts import Doubts, doubts
from .drawings import bar, dots
from .notes import notes
from .page import Page, embedded
from .ranking import Ranking, arrays_of, ranking
from .results import Results
from .store import LABEL, MATRIX, REPORT, RunFolder
from .verdict import written

PICTURE = "matrix.png"
FIGURE = "matrix"
"""The matrix as a figure: ``matrix.svg`` and ``matrix.pdf`` beside ``matrix.png``."""
SANITY = "sanity.png"
"""The picture that ``robustexplain sanity`` writes into the same directory."""
SANITY_PAGE = "sanity.html"


def write_report(folder: RunFolder, out: Path | None = None) -> Path:
    """Write the report, the tables and the figures of a run; cells that are not finished, or damaged, stay empty.

    Args:
        folder: the run.
        out: where they are written; default the run's own directory.
    """
    results, out = Results.read(folder), out or folder.root
    found, arrays = doubts(results), arrays_of(results, folder)
    ranked = ranking(results, arrays, found)
    _write_tables(out, results, ranked, found)
    figure = matrix_figure(results, ranked, found)
    for kind in ("png", "svg", "pdf"):
        drawn = plots.figure_bytes(figure, kind)
        figure.set_layout_engine("none")  # it is laid out now
        files.replace_file(out / f"{FIGURE}.{kind}", lambda aside, drawn=drawn: aside.write_bytes(drawn))  # type: ignore[misc]
    write_audits(results.experiment, folder, out)
    page = Page(results, folder, arrays, found, ranked, audit_page.read(results.experiment, folder))
    return files.write_text(out / REPORT, html(page))


def _write_tables(out: Path, results: Results, ranked: Ranking, found: Doubts) -> None:
    files.write_text(out / MATRIX, exports.as_csv(results, ranked, found))
    files.write_text((out / MATRIX).with_suffix(".md"), exports.as_markdown(results, ranked, found))
    files.write_text((out / MATRIX).with_suffix(".tex"), exports.as_latex(results, ranked, found))
    exports.write_parquet((out / MATRIX).with_suffix(".parquet"), results, ranked, found)


def matrix_figure(results: Results, ranked: Ranking, found: Doubts) -> Any:
    """The main measure over all cells as a figure with 95% intervals, worst case first, doubted cells hatched.

    The column of unchanged inputs is left out where the measure is an attacker's success: nobody attacks there.
    """
    rows = [*ranked.cases, *(r.label for r in results.experiment.rows if r.label not in ranked.cases)]
    columns = [c for c in results.experiment.columns if results.main == "correct" or not c.facts.clean]
    leading = ranked.leading if ranked.cases else {}
    first = len(leading)
    values = np.full((len(rows), first + len(columns)), np.nan)
    texts = [["" for _ in range(values.shape[1])] for _ in rows]
    doubted, each = np.zeros(values.shape, bool), {}
    for i, row in enumerate(rows):
        for j, cases in enumerate(leading.values()):
            if (case := cases.get(row)) is not None and case.share.value is not None:
                values[i, j], texts[i][j] = case.share.value, _in_figure(case.share.as_dict())
                doubted[i, j], each[i, j] = bool(case.doubted), case.each
        for j, column in enumerate(columns, first):
            known, cell = results.measure(row, column.label, results.main), results.cells[row, column.label]
            texts[i][j] = "failed" if cell and cell["status"] != "done" else "-"
            doubted[i, j] = (row, column.label) in found
            if known:
                values[i, j], texts[i][j] = known["value"], _in_figure(known, results.raised(row, column.label))
                each[i, j] = tuple(share for share in known.get("each", ()) if share is not None)
    heads = [head.replace(", ", ",\n") for head in leading]
    heads += [f"{c.label}\n{c.facts.settings}".strip() for c in columns]
    lying = np.array([results.experiment.manipulated(results.experiment.row(row)) for row in rows], dtype=bool)
    plain = lying[:, None] | np.array([*[False] * first, *(c.facts.control for c in columns)], dtype=bool)
    good, several = results.words[results.main].good, {place: shares for place, shares in each.items() if shares}
    return plots.matrix_figure(rows, heads, values, texts, good, doubted, plain, first, several)


def _in_figure(e: Mapping[str, Any], raised: int | None = None) -> str:
    steps = "" if raised is None else f"\n{raised} steps"
    return f"{e['value']:.2f}\n[{e['low']:.2f}, {e['high']:.2f}]{steps}"


def html(page: Page) -> str:
    """The whole report as one HTML file: pictures, styles and script inside, nothing loaded from elsewhere."""
    results, folder = page.results, page.folder
    drawn = folder.root / SANITY
    return pages.render(
        "robustexplain.evaluation",
        "report.html.j2",
        page=page,
        recipe=results.experiment,
        run=results.run,
        results=results,
        main=results.words[results.main],
        opened=page.opened,  # before its pictures are written
        sanity=embedded(drawn.read_bytes()) if drawn.is_file() else None,
        sanity_page=SANITY_PAGE if (folder.root / SANITY_PAGE).is_file() else None,
        curves=_learning_curves(results, folder),
        audits_page=audit_page.PAGE if page.audits else None,
        notes=notes(results),
        plausible=results.experiment.evaluation.plausible,
        explaining=any(column.facts.keeps_prediction for column in results.experiment.columns),
        words=audit_page.FIGURES,
        bar=bar,
        dots=dots,
        written=written,
        parquet=importlib.util.find_spec("pyarrow") is not None,
    )


def _learning_curves(results: Results, folder: RunFolder) -> str | None:
    """The histories of the trainings of the run's rows as a picture; ``None`` if there are none."""
    found = training.histories(folder.training) if folder.training.is_dir() else {}
    rows = {row.label for row in results.experiment.rows}
    found = {name: epochs for name, epochs in found.items() if _owners(folder, name) <= rows}
    if not found:
        return None
    return embedded(plots.learning_curves({_training_name(folder, name): epochs for name, epochs in found.items()}))


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


def print_matrix(results: Results, ranked: Ranking, doubted: Doubts) -> None:
    """The matrix on the terminal, worst case first; ``?`` marks what is in doubt."""
    from rich.console import Console
    from rich.table import Table

    title = results.words[results.main].title.lower()
    shown = Table(title=f"{results.experiment.name}: {title}, {results.judged} {results.things}")
    shown.add_column("")
    for head in ranked.leading:
        shown.add_column(head, justify="right")
    for column in results.experiment.columns:
        shown.add_column(column.label, justify="right")
    for row in [*ranked.cases, *(r.label for r in results.experiment.rows if r.label not in ranked.cases)]:
        cells = []
        for cases in ranked.leading.values():
            share = None if (case := cases.get(row)) is None else case.share.value
            cells.append("-" if case is None or share is None else f"{share:.2f}{'?' * bool(case.doubted)}")
        for column in results.experiment.columns:
            e = results.of_attackers(row, column)
            cells.append("-" if e is None else f"{e['value']:.2f}{'?' * ((row, column.label) in doubted)}")
        shown.add_row(row, *cells)
    # Labels are the user's text, not rich's markup.
    console = Console(markup=False, emoji=False)
    (console if console.is_terminal else Console(width=150, markup=False, emoji=False)).print(shown)
