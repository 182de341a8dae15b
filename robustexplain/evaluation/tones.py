"""How the cells of a report are coloured: by what speaks for the defender in that column, if anything does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..recipe.experiment import AttackFacts
from .doubts import Doubts
from .results import Results

Kind = Literal["risk", "control", "shade", "plain", "hole", "empty", "none"]
ATTACKERS_ALONE = ("joint", "success", "confidence", "plausible", "separation", "auc")
"""Beginnings of measures that say something of an attacker, and nothing where the input is the clean one."""


@dataclass(frozen=True)
class Look:
    """How one cell of a table looks.

    Args:
        kind: ``risk``: from safe to open; ``control``: from nothing to open, as to withstand a control is no merit;
            ``shade``: more or less of something that is neither; ``plain``: uncoloured; ``hole``: failed or missing;
            ``empty``: not measured; ``none``: nobody attacks there, so that nothing is shown of an attacker's success.
        level: 0 to 1, what is open, or how much there is.
        estimate: what is written there.
        why: why it is not to be believed.
        status: what stands in a hole.
    """

    kind: Kind
    level: float
    estimate: dict[str, Any] | None
    why: tuple[str, ...] = ()
    status: str = ""


def look(results: Results, doubts: Doubts, row: str, column: str, name: str) -> Look:
    """How a measure of a cell looks."""
    cell = results.cells.get((row, column))
    if cell is None or cell["status"] != "done":
        return Look("hole", 0.0, None, (), "missing" if cell is None else str(cell["status"]))
    found = results.measure(row, column, name)
    why = tuple(doubts.get((row, column), ()))
    if found is None:
        return Look("empty", 0.0, None, why)
    facts = next(c for c in results.experiment.columns if c.label == column).facts
    if facts.clean and name.startswith(ATTACKERS_ALONE):
        return Look("none", 0.0, None, why)
    if results.experiment.manipulated(results.experiment.row(row)) and name.startswith(ATTACKERS_ALONE):
        # Its owner lies: that no attacker on inputs wins speaks for nobody.
        return Look("plain", 0.0, found, why)
    kind, level = tone(name, results.words[name].good if name in results.words else "neither", facts, found["value"])
    return Look(kind, level, found, why)


def tone(name: str, good: str, facts: AttackFacts, value: float) -> tuple[Kind, float]:
    """Colour and level of a value; an alarm is a good one on an attack, and a false one on what is none."""
    share = min(max(value, 0.0), 1.0)
    if name == "alarm":
        return "risk", share if facts.control else 1 - share
    if facts.control and name.startswith(("plausible", "auc", "separation")):
        return "plain", 0.0
    if good == "neither":
        return "shade", share
    level = share if good == "low" else 1 - share
    return ("control" if facts.control and name.startswith(ATTACKERS_ALONE) else "risk"), level
