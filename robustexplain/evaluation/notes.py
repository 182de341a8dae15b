"""What the figures of a run themselves give reason to doubt."""

from __future__ import annotations

from .results import Results


def notes(results: Results) -> list[str]:
    """What the figures themselves give reason to doubt."""
    said = []
    for (row, column), cell in results.cells.items():
        said += _silent(results, row, column)
        if cell and cell.get("knowledge") == "adaptive" and cell["status"] == "done":
            said += _weaker(results, row, column)
    return said + _noise(results) + _nothing_to_adapt(results)


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
                f"{row} / {column}: {words} for {found['value']:.0%} of the {results.things}; "
                "a weak attack here says nothing about the defense"
            )
    return said


def _weaker(results: Results, row: str, column: str) -> list[str]:
    """An attacker who knows the defense and does worse than one who ignores it has not been tried hard enough."""
    adapts = results.measure(row, column, "joint")
    for other in results.experiment.columns:
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
    """Columns whose attack changes nothing for a defense that it knows of, but for what it is aimed at."""
    return [
        f"{column.label}: this attack has nothing to adapt: it is aimed at the defended system itself, with the "
        "settings that it would have without a defense"
        for column in results.experiment.columns
        if column.knowledge == "adaptive" and not column.facts.adapts and _defended(results)
    ]


def _defended(results: Results) -> bool:
    return any(row.kind == "defense" for row in results.experiment.rows)


def _noise(results: Results) -> list[str]:
    """A control that does as well as an attack shows a brittle system, or an attack that does nothing."""
    said = []
    columns = [column for column in results.experiment.columns if not column.facts.keeps_prediction]
    noise = [column.label for column in columns if column.facts.control]
    others = [column.label for column in columns if not column.facts.control]
    for row in results.experiment.rows:
        for quiet in noise:
            control = results.measure(row.label, quiet, "success")
            for other in others:
                attack = results.measure(row.label, other, "success")
                if control and attack and control["value"] > 0 and attack["high"] <= control["low"]:
                    said.append(f"{row.label}: {quiet!r}, a control, misleads the classifier as often as {other!r}")
    return said
