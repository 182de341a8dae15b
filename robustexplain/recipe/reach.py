"""Attacks whose steps end before the border of their ball and do not grow with it: a larger one changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from .experiment import Recipe


def short_of_reach(recipe: Recipe) -> list[str]:
    """One line for each attack of the recipe, in a column or in a defense's training, that cannot reach its ``eps``.

    A larger radius would change nothing about such an attack.
    """
    known = [(column.label, column.attack) for column in recipe.columns]
    known += [(f"{row.label}: {name}", attack) for row in recipe.rows for name, attack in _attacks(row.settings)]
    return [f"{label}: {attack.short_of}" for label, attack in known if getattr(attack, "short_of", "")]


def _attacks(part: Any) -> Iterator[tuple[str, Any]]:
    """The attacks in the settings of a defense, and in settings within these, with the names of the fields."""
    if not is_dataclass(part):
        return
    for name, value in ((f.name, getattr(part, f.name)) for f in fields(part)):
        for one in value if isinstance(value, tuple) else (value,):
            if hasattr(one, "needs_maps") and hasattr(one, "plan"):
                yield name, one
            else:
                yield from _attacks(one)
