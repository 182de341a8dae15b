"""Warnings about a run that follow from its figures."""

from __future__ import annotations

from collections import Counter

from .results import Results


def notes(results: Results) -> list[str]:
    """Warnings about a run that follow from its figures, a sentence each."""
    return [*general(results), *of_cells(results)]


def general(results: Results) -> list[str]:
    """Warnings about the whole run: its files, its machines, its columns."""
    return [*_damaged(results), *_machines(results), *_nothing_to_adapt(results)]


def of_cells(results: Results) -> list[str]:
    """Warnings about single cells."""
    warnings = []
    for (row, column), cell in results.cells.items():
        warnings += _silent(results, row, column)
        if cell and cell.get("knowledge") == "adaptive" and cell["status"] == "done":
            warnings += _weaker(results, row, column)
    return [*warnings, *_noise(results)]


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


SILENT = {
    "zero_direction": "the search found no direction",
    "stalled": "the search never got its objective below where it began",
    "surrogate_misled": "the surrogate that the search followed improved and the real system did not",
}


def _silent(results: Results, row: str, column: str) -> list[str]:
    """Warnings of searches that failed by their own account: a failing attack looks like robustness."""
    warnings = []
    for name, words in SILENT.items():
        found = results.measure(row, column, name)
        if found and found["value"] > 0:
            warnings.append(
                f"{row} / {column}: {words} for {found['value']:.0%} of the {results.things}; "
                "a weak attack here says nothing about the defense"
            )
    return warnings


def _weaker(results: Results, row: str, column: str) -> list[str]:
    """An adaptive attack that does worse than the same attack of an adversary who knows less is too weak."""
    adapts, same = results.measure(row, column, "joint"), results.cells[row, column]
    for other in results.experiment.columns:
        theirs = results.cells.get((row, other.label))
        if not theirs or not same or theirs.get("attack") != same.get("attack"):
            continue
        ignores = results.measure(row, other.label, "joint")
        if other.knowledge == "adaptive" or adapts is None or ignores is None:
            continue
        if ignores["low"] > adapts["high"]:
            return [
                f"{row}: {other.label!r} ({ignores['value']:.2f}) does better than {column!r} "
                f"({adapts['value']:.2f}): the adaptive attack is not the strongest one here, so trust the worse figure"
            ]
    return []


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


def _noise(results: Results) -> list[str]:
    """Controls that succeed as often as an attack: the system is brittle, or the attack is too weak."""
    warnings = []
    columns = [column for column in results.experiment.columns if not column.facts.keeps_prediction]
    noise = [column.label for column in columns if column.facts.control]
    others = [column.label for column in columns if not column.facts.control]
    for row in results.experiment.rows:
        for control_label in noise:
            control = results.measure(row.label, control_label, "success")
            for other in others:
                attack = results.measure(row.label, other, "success")
                if control and attack and control["value"] > 0 and attack["high"] <= control["low"]:
                    warnings.append(
                        f"{row.label}: {control_label!r}, a control, misleads the classifier as often as {other!r}"
                    )
    return warnings
