"""Columns of a table, given by their place or by their name.

Components keep what they are given; whoever knows the names of the columns (a recipe, from ``data.features``) turns
names into places with :func:`with_indices` before anything runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from .errors import InputError, UnknownNameError

Feature = int | str
"""A column of a table: its place, counted from 0, or its name."""

T = TypeVar("T")


def index_of(column: Feature, features: Sequence[str] = (), *, width: int | None = None) -> int:
    """The place of a column.

    Args:
        column: a place or a name.
        features: the names of the columns, as ``data.features`` gives them; none if they are not known.
        width: how many columns there are; default as many as there are names, and unknown without names.

    Raises:
        UnknownNameError: a name that no column has, with the nearest ones.
        InputError: a place that no column has, a name where names are not known, or neither.
    """
    if isinstance(column, str):
        if not features:
            raise InputError(
                f"column {column!r} is a name, and names of columns are not known here: give its place, or put places "
                "for names first with robustexplain.features.with_indices(component, data.features)"
            )
        if column not in features:
            raise UnknownNameError("column", column, features)
        return list(features).index(column)
    if isinstance(column, bool) or not isinstance(column, int):
        raise InputError(f"a column is given by its place or its name, got {column!r}")
    number = (len(features) or None) if width is None else width
    if column < 0 or (number is not None and column >= number):
        allowed = "0 or more" if number is None else f"0 to {number - 1}"
        raise InputError(f"column {column} does not exist: places are {allowed}")
    return column


def with_indices(component: T, features: Sequence[str]) -> T:
    """``component`` with places for the names of columns, its nested components too; itself if nothing changes.

    A component says which of its fields hold a column, several columns or ``None`` by a class variable
    ``columns: ClassVar[tuple[str, ...]]``.

    Args:
        component: a dataclass; anything else, and every field that holds no component, stays as it is.
        features: the names of the columns, as ``data.features`` gives them.

    Raises:
        UnknownNameError: a name that no column has, with the nearest ones.
        InputError: a place that no column has.
    """
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        return component
    named: tuple[str, ...] = getattr(component, "columns", ())
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(component):
        before = getattr(component, field.name)
        after = _places(before, features) if field.name in named else _inside(before, features)
        if field.init and after is not before:
            changed[field.name] = after
    return dataclasses.replace(component, **changed) if changed else component


def _places(value: Any, features: Sequence[str]) -> Any:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        places = tuple(index_of(column, features) for column in value)
        return value if places == tuple(value) else places
    return index_of(value, features)


def _inside(value: Any, features: Sequence[str]) -> Any:
    if isinstance(value, (list, tuple)):
        parts = [with_indices(part, features) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else tuple(parts)
    return with_indices(value, features)
