"""What each cell's attack found of what was planted, and what follows from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..recipe.experiment import Column, Row
from .probing import GOALS, PREDICTIONS, Probes
from .statistics import share

KINDS = {"goals": GOALS, "predictions": PREDICTIONS}
WORDS = {
    "goals": ("maps that the system shows of some input in the ball", "planted maps"),
    "predictions": ("adversarial examples that are known to exist", "planted predictions"),
}
"""What is planted, by kind, and its name."""


def planted_of(probes: Probes, row: Row, column: Column) -> dict[str, Any]:
    """What a cell says of it, by kind: the share ``found``, and how many inputs it was ``asked`` for.

    For predictions also the share that ``random`` points find.
    """
    names, kept = probes.names(row, column), {}
    for kind, name in KINDS.items():
        found = probes.read(probes.cell(row, column, name)) if name in names else None
        if found is not None:
            kept[kind] = _summary(found)
    return kept


def _summary(found: dict[str, Tensor]) -> dict[str, Any]:
    summary: dict[str, Any] = {"found": share(found["found"]).as_dict(), "asked": len(found["asked"])}
    if "random" in found:
        summary["random"] = share(found["random"]).value
    return summary


def unproven(probes: Probes, row: Row, column: Column) -> list[str]:
    """Why an attack is not proven, in words: it misses what is known to be there."""
    found = []
    for kind, known in planted_of(probes, row, column).items():
        value, limit = known["found"]["value"], probes.settings.found
        if value is not None and value < limit:
            (what, name), count = WORDS[kind], known["found"]["count"]
            found.append(
                f"attack not proven: of {count} {name} ({what}) it found {_told(known)}, and an attack that proves "
                f"something at least {limit:.0%}: what it does not reach says nothing about a defense"
            )
    return found


def audit_words(cell: dict[str, Any]) -> list[str]:
    """What a report says of a cell's audit: steps that were added, and what was found of what was planted."""
    more = cell.get("raised")
    sentences = [f"Twice the steps won more: {more['to']} are taken instead of {more['asked']}."] if more else []
    for kind, known in cell.get("planted", {}).items():
        name, count = WORDS[kind][1], known["found"]["count"]
        if count:
            sentences.append(f"Of {count} {name} the attack found {_told(known)}.")
        elif kind == "goals":
            sentences.append(f"No map could be planted for any of {known['asked']} inputs.")
    return sentences


def _told(known: dict[str, Any]) -> str:
    e = known["found"]
    words = f"{e['value']:.0%} [{e['low']:.0%}, {e['high']:.0%}]"
    return words if known.get("random") is None else f"{words} (random points: {known['random']:.0%})"
