"""The columns of a matrix: attacks, and what their adversaries know, see and want."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..registry import ATTACKS
from ..renamed import KNOWLEDGE, renamed
from ..schema import make, model_of, validate
from .entries import split
from .experiment import Column, GoalMap, Knowledge


@dataclass(frozen=True)
class ColumnSettings:
    """What the entry of an attack says beside the attack's own settings."""

    knowledge: Knowledge | list[Knowledge] = "oblivious"
    goal_map: GoalMap = "benign"
    source: str | list[str] | None = None
    label: str | None = None


def columns_of(entry: Any, path: str, rows: Sequence[str]) -> list[Column]:
    """The columns of one entry: one for each level of knowledge and each source.

    Args:
        entry: as the recipe holds it.
        path: where it stands there.
        rows: labels of the rows, which ``source`` may name.

    Raises:
        InputError: what is wrong, with its path.
    """
    found, own, extra = split(ATTACKS, entry, path, ("knowledge", "goal_map", "source", "label"))
    cls: Any = found.build
    attack = make(cls, own, path)
    known_by = extra.get("knowledge")
    for word in known_by if isinstance(known_by, list) else [known_by]:
        if said := renamed(word, KNOWLEDGE):
            raise InputError(f"{path}.knowledge: unknown word {word!r}{said}")
    play = validate(model_of(ColumnSettings), extra, path)
    levels = play.knowledge if isinstance(play.knowledge, list) else [play.knowledge]
    sources = play.source if isinstance(play.source, list) else [play.source]
    for source in sources:
        if source is not None and source not in rows:
            raise InputError(f"{path}.source: no row of the recipe is called {source!r}; it has {', '.join(rows)}")
    if play.goal_map != "benign" and not attack.needs_maps:
        raise InputError(f"{path}.goal_map: {found.name} does not look at maps, so it has no goal map")
    goal = "" if play.goal_map == "benign" else f", {play.goal_map}"
    named = isinstance(play.knowledge, list) or "knowledge" in extra
    columns = []
    for level, source in itertools.product(levels, sources):
        crafted = "" if source is None else f", from {source}"
        label = (play.label or found.name) + goal + (f", {level}" if named else "") + crafted
        columns.append(Column(label, attack, level, play.goal_map, source))
    return columns
