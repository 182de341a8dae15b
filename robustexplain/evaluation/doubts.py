"""Which cells are not to be believed, and why: a cell that looks robust may only show a weak attack."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .notes import SILENT
from .results import Results
from .sweeps import sweeps

MATERIAL = 0.05
"""The share of inputs for which a search may fail by its own account before its cell is in doubt."""

Doubts = dict[tuple[str, str], list[str]]
"""Reasons, by row and column; a cell without any is not there."""


def doubts(results: Results) -> Doubts:
    """The cells in doubt: flags of the audit that a cell or its row carries, and what figures say of each other."""
    found: Doubts = {}
    smaller: dict[str, list[str]] = {}
    for sweep in sweeps(results.experiment.columns):
        for i, larger in enumerate(sweep.columns):
            smaller.setdefault(larger.label, []).extend(other.label for other in sweep.columns[:i])
    for (row, column), cell in results.cells.items():
        if cell is None or cell["status"] != "done":
            continue
        kind = next(c for c in results.experiment.columns if c.label == column).facts
        if kind.clean:
            continue
        # A cell that was audited carries these as flags, by tests of its own.
        checked = kind.control or "flags" in cell
        own = [] if checked else [*_silent(results, row, column), *_weak(results, row, column)]
        own += [less for other in smaller.get(column, ()) if (less := _less(results, row, other, column))]
        if why := list(dict.fromkeys([*_flags(cell), *own])):
            found[row, column] = why
    return found


def _flags(holder: dict[str, Any]) -> Iterable[str]:
    """The reasons that the audit wrote."""
    return [str(flag["reason"]) for flag in holder.get("flags", [])]


def names(results: Results) -> dict[str, str]:
    """The names of the audit's flags by their reasons, which hold figures of single cells."""
    cells = [cell for cell in results.cells.values() if cell]
    return {str(flag["reason"]): str(flag["name"]) for cell in cells for flag in cell.get("flags", [])}


def _silent(results: Results, row: str, column: str) -> list[str]:
    """Searches that failed by their own account where the attack did not win everywhere."""
    joint = results.measure(row, column, "joint")
    if joint is None or joint["value"] >= 1:
        return []
    shares = {name: results.measure(row, column, name) for name in SILENT}
    return [SILENT[name] for name, e in shares.items() if e is not None and e["value"] > MATERIAL]


def _weak(results: Results, row: str, column: str) -> list[str]:
    """An attack that a control equals, and an adaptive one that one of less knowledge beats."""
    columns = {c.label: c for c in results.experiment.columns}
    mine, why = columns[column], []
    others = [
        c for c in columns.values() if c.label != column and c.facts.keeps_prediction == mine.facts.keeps_prediction
    ]
    for other in others:
        name = "success" if other.facts.control else "joint"
        theirs, own = results.measure(row, other.label, name), results.measure(row, column, name)
        if theirs is None or own is None or other.facts.clean:
            continue
        if other.facts.control and not mine.facts.keeps_prediction and own["high"] <= theirs["low"]:
            why.append("a control without a search misleads the classifier as often")
        elif not other.facts.control and _knows_less(other.knowledge, mine.knowledge) and theirs["low"] > own["high"]:
            why.append("an attacker who knows less does better: the adaptive attack is too weak here")
    return why


def _less(results: Results, row: str, smaller: str, larger: str) -> str | None:
    """An attack that wins less with a larger radius, or with more steps, did not search well."""
    a, b = (results.measure(row, column, "joint") for column in (smaller, larger))
    falls = a is not None and b is not None and a["low"] > b["high"]
    return "the same attack does better with a smaller eps, or with fewer steps" if falls else None


def _knows_less(other: str, mine: str) -> bool:
    return mine == "adaptive" and other != "adaptive"
