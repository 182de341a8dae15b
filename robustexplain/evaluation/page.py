"""What ``report.html`` shows: everything that its template writes down, and nothing that it must work out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from ..recipe.experiment import Column, Row
from ..recipe.spelled import spelled
from . import drawings
from .audit_page import Audited
from .certified import SHARES
from .doubts import Doubts
from .glossary import DOCS, Term, glossary
from .planting import audit_words
from .ranking import Arrays, Ranking
from .results import Results
from .store import RunFolder
from .strips import Pictures, Strip, class_name, shown, strips
from .sweeps import Sweep, sweeps
from .tones import Look, look
from .verdict import verdict
from .words import Words

CALIBRATED_ON = {
    "test": "the test part beyond the judged ones",
    "defense": "the defense part, which trains defenses",
    "judged": "the judged ones themselves, as there are no others",
}
"""Where inputs are from on which rows are calibrated."""
FACTS = ("success", "plausible", "alarm", "separation")
"""Measures that stand in a cell's own part of the page."""


@dataclass(frozen=True)
class Opened:
    """What a cell opens to.

    Args:
        key: its anchor.
        row: label.
        column: label.
        look: of the main measure.
        facts: further measures: title and look.
        drawn: distributions and ROC curves.
        strips: pictures of inputs.
        open: whether it is unfolded at first.
        audited: what the audit did and found, in sentences.
    """

    key: str
    row: str
    column: str
    look: Look
    facts: tuple[tuple[str, Look], ...]
    drawn: tuple[tuple[str, Markup], ...]
    strips: tuple[Strip, ...]
    open: bool
    audited: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Page:
    """The page of a run.

    Args:
        results: what the run directory holds.
        folder: it.
        arrays: of the cells.
        doubts: which cells are not to be believed.
        ranked: the rows by their worst case.
        audits: of manipulated rows.
    """

    results: Results
    folder: RunFolder
    arrays: Arrays
    doubts: Doubts
    ranked: Ranking
    audits: list[Audited]

    @property
    def sentences(self) -> list[str]:
        """The first paragraph."""
        return verdict(self.results, self.ranked, self.doubts, self.audits)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows that their owners did not manipulate, by their worst case; then the others."""
        experiment = self.results.experiment
        known = [experiment.row(label) for label in self.ranked.cases]
        return [*known, *(row for row in experiment.rows if row.label not in self.ranked.cases)]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns."""
        return self.results.experiment.columns

    def key(self, row: Row, column: Column) -> str:
        """The anchor of a cell."""
        experiment = self.results.experiment
        return f"c{experiment.rows.index(row)}-{experiment.columns.index(column)}"

    @staticmethod
    def head(column: Column) -> str:
        """A column's label without the settings that stand below it."""
        facts, label = column.facts, column.label
        for name, value in (("eps", facts.eps), ("steps", facts.steps)):
            label = label if value is None else label.replace(f", {name} {spelled(value)}", "")
        return label

    def look(self, row: str, column: str, name: str) -> Look:
        """How a measure of a cell looks."""
        return look(self.results, self.doubts, row, column, name)

    @property
    def measures(self) -> dict[str, Words]:
        """The measures with a table of their own: those of inputs that are right only where they differ from all."""
        found = self.results
        hidden = {f"{name}_correct" for name in ("joint", "success") if not found.differs(f"{name}_correct", name)}
        kept = {n: words for n, words in found.words.items() if found.has(n) and n not in hidden}
        return {n: w for n, w in kept.items() if n != found.main or len(kept) == 1}

    @property
    def doubted(self) -> list[tuple[str, list[str], list[str]]]:
        """The cells in doubt: a row, those of its columns that are in doubt for the same reasons, and the reasons."""
        found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (row, column), why in self.doubts.items():
            found.setdefault((row, tuple(why)), []).append(column)
        return [(row, columns, list(why)) for (row, why), columns in found.items()]

    @property
    def charts(self) -> list[tuple[str, Markup]]:
        """A curve for each group of columns that differ in eps or steps alone."""
        return [(sweep.title, self._chart(sweep)) for sweep in sweeps(self.columns)]

    def _chart(self, sweep: Sweep) -> Markup:
        lines, places = [], set(sweep.values)
        for row in self.rows:
            points = []
            for value, column in zip(sweep.values, sweep.columns, strict=True):
                e = self.results.measure(row.label, column.label, self.results.main)
                raised = self.results.raised(row.label, column.label) if sweep.setting == "steps" else None
                if e is not None:
                    each = [one for one in e.get("each", ()) if one is not None]
                    doubted = (row.label, column.label) in self.doubts
                    points.append(((raised or value, e["value"], e["low"], e["high"]), doubted, each))
            if points:
                # Attacks whose steps were raised stand at those that they took.
                points.sort(key=lambda point: point[0][0])
                places.update(point[0][0] for point in points)
                lines.append(drawings.Line(row.label, *map(list, zip(*points, strict=True))))
        ticks = [(value, spelled(value)) for value in sorted(places)]
        return drawings.chart(lines, ticks, sweep.setting, "joint success") if lines else Markup("")

    @cached_property
    def opened(self) -> list[tuple[Row, list[Opened]]]:
        """What every cell opens to, by row; makes the pictures."""
        return [(row, [cell for c in self.columns if (cell := self._open(row, c)) is not None]) for row in self.rows]

    @cached_property
    def pictures(self) -> Pictures:
        """The pictures of the page; filled by ``opened``."""
        return Pictures()

    @cached_property
    def _at_first(self) -> set[str]:
        """The columns whose cells are unfolded at first: the strongest adversaries'."""
        about_maps = [c for c in self.columns if c.facts.needs_maps]
        adaptive = [c for c in about_maps if c.knowledge == "adaptive"]
        return {c.label for c in adaptive or about_maps or self.columns}

    @property
    def certified(self) -> dict[str, str]:
        """The measures of certificates that any row has, by name, with the heads of their columns."""
        return {name: self.results.words[name].title for name in SHARES if self.results.has(name)}

    def certificate(self, row: Row, name: str) -> dict[str, Any] | None:
        """A measure of a row's certificates of the judged inputs as they are, from its first cell that has it."""
        found = (self.results.measure(row.label, column.label, name) for column in self.columns)
        return next((one for one in found if one is not None), None)

    def _open(self, row: Row, column: Column) -> Opened | None:
        arrays = self.arrays.get((row.label, column.label))
        if arrays is None:
            return None
        facts = (
            (self.results.words[n].title, self.look(row.label, column.label, n))
            for n in FACTS
            if n in self.results.words
        )
        count = shown(self.results.experiment.evaluation.pictures, len(self.arrays))
        run = self.results.run
        return Opened(
            key=self.key(row, column),
            row=row.label,
            column=column.label,
            look=self.look(row.label, column.label, self.results.main),
            facts=tuple((title, one) for title, one in facts if one.estimate is not None),
            drawn=() if column.facts.clean else self._drawn(row, arrays),
            strips=tuple(strips(arrays, count, self.pictures, run.get("features", []), run.get("classes", []))),
            open=column.label in self._at_first,
            audited=tuple(_beside(self.results.cells[row.label, column.label] or {})),
        )

    @cached_property
    def _calibrated(self) -> dict[str, dict[str, Tensor]]:
        found = {label: self.folder.calibrated(label) for label in self.results.calibrations}
        return {label: known[1] for label, known in found.items() if known is not None}

    def _drawn(self, row: Row, arrays: Any) -> tuple[tuple[str, Markup], ...]:
        beside, known = self._calibrated.get(row.label), self.results.calibrations.get(row.label, {})
        harmless = torch.empty(0) if beside is None else beside["distance"][beside["kept"] > 0]
        if beside is None or "distance" not in arrays or not len(harmless):
            return ()
        curves = [("maps", harmless, arrays["distance"])]
        name = str(known.get("distance", "distance"))
        drawn = drawings.distributions(harmless, arrays["distance"], known.get("limit"), name)
        pairs = [("Distances of maps", drawn)]
        if "score" in arrays and "score" in beside:
            drawn = drawings.distributions(beside["score"], arrays["score"], None, "score")
            pairs.append(("Scores of the detector", drawn))
            curves.append(("detector", beside["score"], arrays["score"]))
        return (*pairs, ("ROC", drawings.roc(curves)))

    @property
    def calibrated(self) -> dict[str, Any]:
        """What rows have in common of their calibrations; empty without any."""
        return next(iter(self.results.calibrations.values()), {})

    @property
    def calibrated_on(self) -> str:
        """Where the calibration's inputs are from."""
        return CALIBRATED_ON.get(self.calibrated.get("part", ""), "")

    @property
    def harmless(self) -> list[str]:
        """The harmless changes in words."""
        return [_change(entry) for entry in self.calibrated.get("harmless", [])]

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Cells that failed."""
        return [cell for cell in self.results.cells.values() if cell and cell["status"] != "done"]

    @property
    def missing(self) -> int:
        """How many cells are not there."""
        return sum(cell is None for cell in self.results.cells.values())

    @property
    def differences(self) -> list[tuple[Row, Column, dict[str, Any]]]:
        """Paired differences to the undefended row, over all seeds if there are several."""
        rows, known = [row for row in self.rows if row.derived], self.results.cells
        cells = ((row, c, known[row.label, c.label]) for row in rows for c in self.columns)
        found = ((r, c, cell.get("seeds", cell).get("against_undefended")) for r, c, cell in cells if cell)
        return [(row, column, against) for row, column, against in found if against]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, the first hundred."""
        names: Sequence[str] = self.results.run.get("classes", [])
        return [class_name(i, names) for i in range(min(len(names), 100))]

    @property
    def terms(self) -> list[Term]:
        """The glossary."""
        return glossary(self.results)

    @property
    def docs(self) -> str:
        """Where the documentation is."""
        return DOCS


def embedded(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _change(entry: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value:.4g}" for key, value in entry.items() if key != "name")
    return f"{entry['name']} ({settings})" if settings else str(entry["name"])


def _beside(cell: dict[str, Any]) -> list[str]:
    """What a cell's interval does not cover, and what its audit found."""
    ends = cell.get("joint_by_limit")
    if not ends or None in ends or ends[0] == ends[1]:
        return audit_words(cell)
    low, high = sorted(ends)
    luck = f"At the ends of the limit's own 95% range joint success is {low:.2f} and {high:.2f}."
    return [luck, *audit_words(cell)]
