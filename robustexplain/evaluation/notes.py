"""Warnings about a whole run; what is to be said of single cells, the audit says."""

from __future__ import annotations

from collections import Counter

from .results import Results


def notes(results: Results) -> list[str]:
    """Warnings about the whole run, a sentence each: its files, its machines, its columns."""
    return [*_damaged(results), *_machines(results), *_nothing_to_adapt(results)]


def _damaged(results: Results) -> list[str]:
    """Files that were left out."""
    return [f"left out: {why}; `robustexplain run` makes it anew" for why in results.damaged]


def _machines(results: Results) -> list[str]:
    """The kinds of machine that the run was made on, if they are several."""
    known = results.run.get("machines", [])
    if len(known) < 2:
        return []
    counts = Counter(cell.get("machine", "unknown") for cell in results.cells.values() if cell)
    made = "; ".join(f"{name} ({counts[name]} cells)" for name in known)
    return [f"made on {len(known)} kinds of machine, on which figures differ in last digits: {made}"]


def _nothing_to_adapt(results: Results) -> list[str]:
    """Adaptive columns whose attack has no setting that depends on the defense."""
    return [
        f"{column.label}: this attack has nothing to adapt: it is aimed at the defended system itself, with the "
        "settings that it would have without a defense"
        for column in results.experiment.columns
        if column.knowledge == "adaptive" and not column.facts.adapts and _defended(results)
    ]


def _defended(results: Results) -> bool:
    return any(row.kind == "defense" for row in results.experiment.rows)
