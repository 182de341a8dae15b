"""The matrix as tables for other programs: CSV and Parquet with every measure, Markdown and LaTeX of the main one."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import files
from .doubts import Doubts
from .ranking import Ranking
from .results import Results
from .worst import WORST

HEAD = ("row", "base", "column", "knowledge", "measure", "value", "low", "high", "count", "eps", "steps", "in doubt")
LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}  # fmt: skip


def lines(results: Results, ranked: Ranking, doubts: Doubts) -> Iterator[tuple[Any, ...]]:
    """Every measure of every cell, and the worst case of every row, as values of ``HEAD``."""
    for row in results.experiment.rows:
        case = ranked.cases.get(row.label)
        if case is not None:
            where = (row.label, row.base, WORST, "")
            found: dict[str, Any] = {"worst": {**case.share.as_dict(), "each": case.each}}
            found |= {f"worst_{aim}": share.as_dict() for aim, share in case.aims.items()}
            compared = {"worst": ranked.cases} | {f"worst_{aim}": side.cases for aim, side in ranked.aims.items()}
            for name, cases in compared.items():
                gap = cases[row.label].difference if row.label in cases else None
                found |= {f"{name}_minus_root": gap.as_dict()} if gap is not None else {}
            yield from _measured(where, found, (None, None, "; ".join(case.doubted)))
        for column in results.experiment.columns:
            cell, facts = results.cells[row.label, column.label], column.facts
            where = (row.label, row.base, column.label, column.knowledge)
            steps = results.raised(row.label, column.label) or facts.steps
            last = (facts.eps, steps, "; ".join(doubts.get((row.label, column.label), [])))
            if cell is None or cell["status"] != "done":
                yield (*where, "status", cell["status"] if cell else "missing", None, None, None, *last)
                continue
            seeds = cell.get("seeds", {"measures": {}, "against_undefended": {}})
            measured = cell["measures"] | seeds["measures"]
            against = cell["against_undefended"] | seeds["against_undefended"]
            # Of the first training alone, where there are several: each training has its own successes.
            first = " seed 1" if cell.get("seeds") else ""
            measured |= {f"{name}_on_successes{first}": e for name, e in cell["on_successes"].items()}
            measured |= {f"{name}_minus_undefended": e for name, e in against.items()}
            yield from _measured(where, measured, last)


def _measured(
    where: tuple[str, str, str, str], measured: dict[str, Any], last: tuple[Any, Any, str]
) -> Iterator[tuple[Any, ...]]:
    """A line for each measure, and for the value of each seed, if there are several: ``joint seed 2``."""
    for name, e in measured.items():
        yield (*where, name, *(e[key] for key in ("value", "low", "high", "count")), *last)
        for i, value in enumerate(e.get("each", ())):
            if value is not None:
                yield (*where, f"{name} seed {i + 1}", value, None, None, None, *last)


def as_csv(results: Results, ranked: Ranking, doubts: Doubts) -> str:
    """All lines as CSV."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(HEAD)
    for line in lines(results, ranked, doubts):
        out.writerow([files.as_text(v) if isinstance(v, str) else number(v) for v in line])
    return buffer.getvalue()


def write_parquet(path: Path, results: Results, ranked: Ranking, doubts: Doubts) -> bool:
    """All lines as Parquet, where ``pyarrow`` is installed; whether it is. A status has no value."""
    if importlib.util.find_spec("pyarrow") is None:
        return False
    import pyarrow
    import pyarrow.parquet

    text, real, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    kinds = (*[text] * 5, *[real] * 3, whole, real, whole, text)
    found = []
    for line in lines(results, ranked, doubts):
        found.append(tuple(None if i == 5 and isinstance(value, str) else value for i, value in enumerate(line)))
    columns = list(zip(*found, strict=True)) or [()] * len(HEAD)
    arrays = [pyarrow.array(list(column), kind) for column, kind in zip(columns, kinds, strict=True)]
    table = pyarrow.Table.from_arrays(arrays, names=list(HEAD))
    files.replace_file(path, lambda aside: pyarrow.parquet.write_table(table, aside))
    return True


def as_markdown(results: Results, ranked: Ranking, doubts: Doubts) -> str:
    """The main measure as a Markdown table, worst case first; ``?`` marks what is in doubt."""
    head, body = _grid(results, ranked, doubts)
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(part.replace('|', chr(92) + '|') for part in row)} |\n" for row in rows)


def as_latex(results: Results, ranked: Ranking, doubts: Doubts) -> str:
    """The main measure as a LaTeX ``tabular``, worst case first; ``?`` marks what is in doubt."""
    head, body = _grid(results, ranked, doubts)
    rows = [" & ".join(map(latex, row)) + r" \\" for row in (head, *body)]
    inside = "\n".join([r"\hline", rows[0], r"\hline", *rows[1:], r"\hline"])
    return f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n{inside}\n\\end{{tabular}}\n"


def latex(text: str) -> str:
    """Text with LaTeX's own signs escaped."""
    return "".join(LATEX.get(sign, sign) for sign in text)


def number(value: float | int | None) -> str:
    """A number in at most nine digits; nothing where there is none."""
    return "" if value is None else f"{value:.9g}"


def _grid(results: Results, ranked: Ranking, doubts: Doubts) -> tuple[list[str], list[list[str]]]:
    columns = results.experiment.columns
    heads = [f"{c.label} ({c.facts.settings})" if c.facts.settings else c.label for c in columns]
    body = []
    for label in [*ranked.cases, *(r.label for r in results.experiment.rows if r.label not in ranked.cases)]:
        known = [cases.get(label) for cases in ranked.leading.values()]
        worst = ["-" if case is None else _written(case.share.as_dict(), bool(case.doubted)) for case in known]
        cells = [
            _written(results.of_attackers(label, c), (label, c.label) in doubts, results.raised(label, c.label))
            for c in columns
        ]
        body.append([label, *worst, *cells])
    return ["", *ranked.leading, *heads], body


def _written(e: dict[str, Any] | None, doubted: bool, raised: int | None = None) -> str:
    if e is None or e["value"] is None:
        return "-"
    steps = "" if raised is None else f" ({raised} steps)"
    return f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]{'?' if doubted else ''}{steps}"
