"""Attacks that win more with twice the steps: the runner gives them the steps (``audit: {raise: true}``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..attacks import Attack
from ..recipe.experiment import Column, Row
from .store import RunFolder

if TYPE_CHECKING:
    from .probing import Probes

MOST = 8
"""By how much steps are raised at most: three times doubled."""


def raised(folder: RunFolder, row: Row, column: Column) -> int | None:
    """The steps to which a finished cell's attack was raised; ``None`` where it has those that were asked for."""
    cell = folder.done(row.label, column.label)
    return None if cell is None or "raised" not in cell else int(cell["raised"]["to"])


def to_raise(probes: Probes, row: Row, column: Column) -> int | None:
    """The steps that a finished cell's attack is to be given; ``None`` where they suffice, or are the most."""
    if not probes.settings.raises or not isinstance(column.attack, Attack):
        return None
    asked, known = getattr(column.attack, "steps", None), probes.gain(row, column)
    if known is None or not isinstance(asked, int):
        return None
    now = 2 * (raised(probes.folder, row, column) or asked)
    return now if now <= MOST * asked and float((known[1] - known[0]).mean()) > probes.settings.steps_gain else None
