"""Which cells are not to be believed, and why: a cell that looks robust may only show a weak attack."""

from __future__ import annotations

from .results import Results

NOT_AUDITED = "the audit has not looked at it yet: the run did not end"
"""Why a cell of an unfinished run is not to be believed."""

Doubts = dict[tuple[str, str], list[str]]
"""Reasons, by row and column; a cell without any is not there."""


def doubts(results: Results) -> Doubts:
    """The reasons of the audit's flags (:mod:`.flags`) by cell; of unchanged inputs, none: they are no evidence."""
    found: Doubts = {}
    for row in results.experiment.rows:
        for column in results.experiment.columns:
            cell = results.cells.get((row.label, column.label))
            if cell is None or cell["status"] != "done" or column.facts.clean:
                continue
            reasons = [flag["reason"] for flag in cell["flags"]] if "flags" in cell else [NOT_AUDITED]
            if reasons:
                found[row.label, column.label] = list(dict.fromkeys(reasons))
    return found
