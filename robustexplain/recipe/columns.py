"""The columns of a matrix: attacks with the knowledge and goals of their adversaries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..registry import ATTACKS
from ..renamed import KNOWLEDGE, renamed
from ..schema import make, model_of, validate
from .entries import split
from .experiment import Column, GoalMap, Knowledge
from .spelled import spelled

SWEPT = ("eps", "steps")
"""Settings of an attack that may be lists: a column for each value."""


@dataclass(frozen=True)
class ColumnSettings:
    """The keys of an attack's entry that are not the attack's own settings."""

    knowledge: Knowledge | list[Knowledge] = "oblivious"  # of an attack that knows the defense: adaptive
    goal_map: GoalMap = "benign"
    source: str | list[str] | None = None
    label: str | None = None


def columns_of(entry: Any, path: str, rows: Sequence[str]) -> list[Column]:
    """The columns of one entry: one for each level of knowledge, each source, and each eps and number of steps.

    Args:
        entry: as the recipe holds it.
        path: where it stands there.
        rows: labels of the rows, which ``source`` may name.

    Raises:
        InputError: what is wrong, with its path.
    """
    found, own, extra = split(ATTACKS, entry, path, ("knowledge", "goal_map", "source", "label"))
    cls: Any = found.build
    attacks = [(words, make(cls, one, path)) for words, one in _swept(own, path)]
    known_by = extra.get("knowledge")
    for word in known_by if isinstance(known_by, list) else [known_by]:
        if hint := renamed(word, KNOWLEDGE):
            raise InputError(f"{path}.knowledge: unknown word {word!r}{hint}")
    settings = validate(model_of(ColumnSettings), extra, path)
    levels = settings.knowledge if isinstance(settings.knowledge, list) else [settings.knowledge]
    levels = ["adaptive"] if "knowledge" not in extra and attacks[0][1].knows_defense else levels
    sources = settings.source if isinstance(settings.source, list) else [settings.source]
    for key, listed in (("knowledge", levels), ("source", sources)):
        if not listed:
            raise InputError(f"{path}.{key}: the list is empty, so that the attack would have no column")
    for source in sources:
        if source is not None and source not in rows:
            raise InputError(f"{path}.source: no row of the recipe is called {source!r}; it has {', '.join(rows)}")
    if settings.goal_map != "benign" and not attacks[0][1].needs_maps:
        raise InputError(f"{path}.goal_map: {found.name} does not look at maps, so it has no goal map")
    goal = "" if settings.goal_map == "benign" else f", {settings.goal_map}"
    named = isinstance(settings.knowledge, list) or "knowledge" in extra
    columns = []
    for level, source, (words, attack) in itertools.product(levels, sources, attacks):
        crafted = "" if source is None else f", from {source}"
        label = (settings.label or found.name) + goal + words + (f", {level}" if named else "") + crafted
        columns.append(Column(label, attack, level, settings.goal_map, source))
    return columns


def _swept(own: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """An attack's settings for each value of those that are lists, and what the label says of it."""
    lists = {name: own[name] for name in SWEPT if isinstance(own.get(name), list)}
    for name, values in lists.items():
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        finite = all(math.isfinite(number) for number in numbers)
        if not values or not finite or len(numbers) < len(values) or len(set(numbers)) < len(values):
            raise InputError(f"{path}.{name}: a number, or a list of different numbers, is needed, got {values!r}")
    made = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        made.append(("".join(f", {name} {spelled(value)}" for name, value in chosen.items()), {**own, **chosen}))
    return made
