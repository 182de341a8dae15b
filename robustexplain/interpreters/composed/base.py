"""The base classes of interpreters made of other interpreters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace

from torch import Tensor
from typing_extensions import Self

from ...checks import Kind
from ...errors import InputError
from ..base import Interpreter


@dataclass(frozen=True, eq=False)
class Composed(Interpreter):
    """An interpreter made of others, its ``parts``; its properties follow from theirs.

    Raises:
        InputError: a part that is no interpreter, or that explains another model object; parts with no kind of input
            in common.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for part in self.parts:
            if not isinstance(part, Interpreter):
                raise InputError(f"every part of {name} must be an Interpreter, got {part!r}; make one with (model)")
            if part.model is not self.model:
                raise InputError(f"every part of {name} must explain the same model object")
        if self.parts and not self.takes:
            kinds = ", ".join(f"{type(part).__name__} takes {' and '.join(part.takes)}" for part in self.parts)
            raise InputError(f"the parts of {name} take no kind of input in common: {kinds}")

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(part.differentiable for part in self.parts)

    @property
    def is_gradient(self) -> bool:  # type: ignore[override]
        """Whether the map of any part is a gradient."""
        return any(part.is_gradient for part in self.parts)

    @property
    def unit_range(self) -> bool:  # type: ignore[override]
        """Whether the maps of every part are masks."""
        return all(part.unit_range for part in self.parts)

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        """Whether the maps of any part are made of cuts or votes."""
        return any(part.rounds for part in self.parts)

    @property
    def class_specific(self) -> bool:  # type: ignore[override]
        """Whether the map of any part depends on the class."""
        return any(part.class_specific for part in self.parts)

    @property
    def takes(self) -> tuple[Kind, ...]:  # type: ignore[override]
        """The kinds of input that every part takes."""
        kinds: tuple[Kind, ...] = ("images", "tables")
        return tuple(kind for kind in kinds if all(kind in part.takes for part in self.parts))

    def _check(self, x: Tensor) -> None:
        for part in self.parts:
            part._check(x)


@dataclass(frozen=True, eq=False)
class Wrapper(Composed):
    """An interpreter around another one, which can be replaced.

    Args:
        base: the interpreter inside; it must explain ``model``.
    """

    base: Interpreter

    def __post_init__(self) -> None:
        if not isinstance(self.base, Interpreter):
            raise InputError(f"base must be an Interpreter, got {self.base!r}; make one with (model)")
        super().__post_init__()

    def around(self, interpreter: Interpreter) -> Self:
        """The same wrapper, with the same settings, around another interpreter."""
        return replace(self, model=interpreter.model, base=interpreter)


def innermost(interpreter: Interpreter) -> Interpreter:
    """The interpreter inside all wrappers; an interpreter that is no wrapper is returned as it is."""
    return innermost(interpreter.base) if isinstance(interpreter, Wrapper) else interpreter


def wrapped_like(pattern: Interpreter, interpreter: Interpreter) -> Interpreter:
    """``interpreter`` inside the same wrappers as ``pattern``, in the same order."""
    if not isinstance(pattern, Wrapper):
        return interpreter
    return pattern.around(wrapped_like(pattern.base, interpreter))


def walk(interpreter: Interpreter) -> Iterator[Interpreter]:
    """The interpreter, its parts, their parts and so on, from the outside in."""
    yield interpreter
    for part in interpreter.parts:
        yield from walk(part)


def same(one: object, other: object) -> bool:
    """Whether two interpreters give the same maps: of one class, with equal settings and the same networks."""
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, type):
        return False
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return isinstance(one, (bool, int, float, str)) and one == other


def in_rows(x: Tensor, target: Tensor | None, most: int) -> list[tuple[Tensor, Tensor | None]]:
    """At most so many inputs at a time, with their classes."""
    parts = math.ceil(len(x) / most)
    targets: tuple[Tensor | None, ...] = (None,) * parts if target is None else target.split(most)
    return list(zip(x.split(most), targets, strict=True))
