"""Columns that differ in one setting alone, eps or steps: a curve instead of a row of figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..recipe.experiment import Column
from ..recipe.spelled import spelled

SETTINGS: tuple[Literal["eps", "steps"], ...] = ("eps", "steps")


@dataclass(frozen=True)
class Sweep:
    """Columns of one attack and one adversary, by a setting.

    Args:
        setting: ``eps`` or ``steps``.
        columns: in its order.
    """

    setting: Literal["eps", "steps"]
    columns: tuple[Column, ...]

    @property
    def title(self) -> str:
        """The attack without the setting: what the labels have in common."""
        values = (getattr(self.columns[0].facts, self.setting), self.columns[0].label)
        part = f", {self.setting} {spelled(values[0])}"
        other = next(s for s in SETTINGS if s != self.setting)
        fixed = getattr(self.columns[0].facts, other)
        words = values[1].replace(part, "")
        return words if fixed is None or f"{other} " in words else f"{words} ({other} {spelled(fixed)})"

    @property
    def values(self) -> list[float]:
        """Of the setting."""
        return [float(getattr(column.facts, self.setting)) for column in self.columns]


def sweeps(columns: Sequence[Column]) -> list[Sweep]:
    """Every group of columns that differ in eps alone, or in steps alone."""
    found = []
    for setting in SETTINGS:
        groups: dict[tuple[object, ...], list[Column]] = defaultdict(list)
        for column in columns:
            facts = column.facts
            other = facts.steps if setting == "eps" else facts.eps
            if getattr(facts, setting) is not None and not facts.clean:
                groups[facts.family, other, column.knowledge, column.goal_map, column.source].append(column)
        for group in groups.values():
            if len({getattr(column.facts, setting) for column in group}) == len(group) > 1:
                ordered = sorted(group, key=lambda column: getattr(column.facts, setting))
                found.append(Sweep(setting, tuple(ordered)))
    return found
