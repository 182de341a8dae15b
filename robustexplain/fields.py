"""Typed, bounded fields of components: checked when an object is made, and read by the recipe's schema.

A component is a frozen dataclass whose fields are annotated with these types. ``check_fields(self)`` in its
``__post_init__`` refuses a value out of range; the recipe's schema (pydantic) reads the same annotations.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

import annotated_types as at
import typing_extensions

from .errors import FieldError


class Finite:
    """A bound of a field: not infinite."""


Eps = Annotated[float, at.Ge(0), at.Le(1)]
"""A radius in the units of ``[0, 1]`` pixels."""
Radius = Annotated[float, at.Ge(0)]
"""A radius that may exceed 1 (an L2 ball)."""
Fraction = Annotated[float, at.Ge(0), at.Le(1)]
"""A share or a probability."""
NonNegative = Annotated[float, at.Ge(0)]
"""A weight."""
Positive = Annotated[float, at.Gt(0), Finite()]
"""A scale, a learning rate, a temperature; finite."""
Count = Annotated[int, at.Ge(1), at.Le(10**9)]
"""A number of steps, epochs or samples."""
Natural = Annotated[int, at.Ge(0)]
"""A number that may be zero: a seed, a warm start of no steps."""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def check_fields(component: Any) -> None:
    """Refuse field values outside their annotated bounds, or none of the annotated ``Literal`` words.

    In tuples of any length (``tuple[Count, ...]``) that holds for every entry.

    Raises:
        FieldError: naming the class, the field, the bound or the words, and the value.
    """
    cls: Any = type(component)
    for field in dataclasses.fields(component):
        value, hint = getattr(component, field.name), _hints(cls).get(field.name)
        for part, annotated in _entries(value, hint):
            if fault := _refused(part, annotated):
                raise FieldError(cls.__name__, field.name, f"must be {fault}, got {part!r}")


def _entries(value: Any, hint: Any) -> list[tuple[Any, Any]]:
    """A value with its annotation; for a tuple of any length its entries with theirs."""
    parts = typing.get_args(hint)
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple and parts[-1:] == (Ellipsis,):
        return [(part, parts[0]) for part in value]
    return [(value, hint)]


def _refused(value: Any, annotation: Any) -> str:
    """What a value of such an annotation must be, if it is not."""
    hint, words = _number_or_word(annotation)
    if (value is None or isinstance(value, str)) and value in words:
        return ""
    if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    fault = _fault(value, hint)
    return f"{fault}, or {', '.join(map(repr, words))}" if fault and words else fault


def check_kinds(component: Any) -> None:
    """Refuse a number, word, truth value, list or ``None`` where the annotation of a field has no place for it.

    For what is read from a file; other values and annotations are left to the component.

    Raises:
        FieldError: naming the class, the field and the value.
    """
    cls: Any = type(component)
    try:
        _hints(cls)
    except (NameError, TypeError):
        return  # annotations that exist for type checkers alone
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        if not _has_place(value, _hints(cls).get(field.name, Any)):
            raise FieldError(cls.__name__, field.name, f"must be {field.type}, got {value!r:.80}")


_PLAIN = (bool, int, float, str, tuple, type(None))


def _has_place(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _has_place(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        return any(_has_place(value, part) for part in parts)
    kind = origin or hint
    if type(value) not in _PLAIN or not isinstance(kind, type) or kind is Any or typing_extensions.is_protocol(kind):
        return True
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind in (bool, object)
    if isinstance(value, int) and kind is float:
        return True
    return isinstance(value, kind)


def identified(value: Any) -> Any:
    """A component for a training's identity: class names and fields at any depth, in which two classes differ.

    ``dataclasses.asdict`` leaves the names out: components of two classes with the same fields are one to it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: identified(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__name__, fields]
    if isinstance(value, Mapping):
        return {key: identified(inner) for key, inner in value.items()}
    return [identified(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _number_or_word(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """For ``Positive | Literal["auto"] | None`` the bounded number and the words, ``None`` too; else the hint."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    words = [word for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part)]
    words += [None] if type(None) in parts else []
    numbers = [part for part in parts if hasattr(part, "__metadata__")]
    others = [part for part in parts if part is not type(None) and typing.get_origin(part) is not Literal]
    return (numbers[0], tuple(words)) if words and numbers == others and len(numbers) == 1 else (hint, ())


def check_k(component: Any, k: float) -> None:
    """Refuse a field ``k`` that is neither a whole count nor a share below 1.

    Raises:
        FieldError: with the value.
    """
    if k >= 1 and k != int(k):
        raise FieldError(type(component).__name__, "k", f"must be a whole count, or a share below 1, got {k!r}")


def _fault(value: Any, hint: Any) -> str:
    """What a number of such an annotation must be, if the value is not; a word for a number has been looked for."""
    if getattr(hint, "__origin__", None) is int and not isinstance(value, int):
        return "a whole number"
    return next(filter(None, (_beyond(value, bound) for bound in getattr(hint, "__metadata__", ()))), "")


def _beyond(value: Any, bound: Any) -> str:
    if value is None or callable(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return "a number"
    if isinstance(bound, Finite):
        return "finite" if math.isinf(value) else ""
    rules = (
        (at.Ge, "at least", lambda v, b: v >= b.ge),
        (at.Gt, "above", lambda v, b: v > b.gt),
        (at.Le, "at most", lambda v, b: v <= b.le),
        (at.Lt, "below", lambda v, b: v < b.lt),
    )
    for kind, words, holds in rules:
        if isinstance(bound, kind) and not holds(value, bound):
            return f"{words} {getattr(bound, kind.__name__.lower())}"
    return ""
