"""From a component's typed fields to the schema of its entry in a recipe, and from a checked entry to the component.

A class with a ``from_entry(entry, path)`` of its own (:class:`Written`) reads its entries itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, Union, get_args, get_origin, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import nn

from .errors import FieldError, InputError
from .renamed import FIELDS, renamed

_FRACTION = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*$")
MOST = 2**63 - 1
"""The largest whole number that a recipe may hold."""
_EXPONENT = re.compile(r"^\s*[+-]?\d+(?:\.\d*)?[eE][+-]?\d+\s*$")


@runtime_checkable
class Written(Protocol):
    """A class whose entries are not just its fields: a name alone may stand for it."""

    @classmethod
    def from_entry(cls, entry: Any, path: str) -> Any:
        """The object that ``entry`` describes; ``path`` is where it stands in the recipe, for errors."""
        ...


class Closed(BaseModel):
    """A model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


DEPTH = 40
"""How deep lists and mappings may be nested."""


def numbers(tree: Any, depth: int = DEPTH) -> Any:
    """The tree with ``"8/255"`` and ``"1e-3"`` (which YAML reads as text) as numbers.

    Raises:
        InputError: for lists and mappings that stand in one another more than ``DEPTH`` deep, or in themselves.
    """
    if isinstance(tree, (dict, list)) and not depth:
        raise InputError(f"lists and mappings stand in one another more than {DEPTH} deep")
    if isinstance(tree, dict):
        return {key: numbers(value, depth - 1) for key, value in tree.items()}
    if isinstance(tree, list):
        return [numbers(value, depth - 1) for value in tree]
    if isinstance(tree, str):
        if match := _FRACTION.match(tree):
            over, under = float(match[1]), float(match[2])
            return over / under if under else tree
        if _EXPONENT.match(tree):
            return float(tree)
    return tree


@cache
def model_of(component: type) -> type[Closed]:
    """The schema of a component: its dataclass fields, but for those that hold networks or say ``recipe: False``."""
    hints = typing.get_type_hints(component, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(component):
        hint = hints[field.name]
        if not field.init or not field.metadata.get("recipe", True) or _holds_network(hint):
            continue
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = ...
        fields[field.name] = (_schema_type(hint), default)
    return create_model(component.__name__, __base__=Closed, **fields)


def make(component: type, entry: dict[str, Any], path: str) -> Any:
    """Check ``entry`` against the component's schema and make the component.

    Raises:
        InputError: a line for each problem, with its path in the recipe, the value and what is allowed.
    """
    model = model_of(component)
    checked = validate(model, entry, path)
    given = _written(component, {name: getattr(checked, name) for name in checked.model_fields_set}, path)
    try:
        return _construct(component, given)
    except FieldError as error:
        raise InputError(f"{path}.{error.field}: {error.problem}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def settings_of(component: type, entry: dict[str, Any], path: str) -> dict[str, Any]:
    """The checked keyword arguments that ``entry`` gives for a component made elsewhere."""
    checked = validate(model_of(component), entry, path)
    given = _written(component, {name: getattr(checked, name) for name in checked.model_fields_set}, path)
    try:
        return _arguments(component, given)
    except FieldError as error:
        raise InputError(f"{path}.{error.field}: {error.problem}") from error


def validate(model: type[Closed], entry: Any, path: str) -> Any:
    """``entry`` as an instance of ``model``, or an ``InputError`` that names every path."""
    if not isinstance(entry, dict):
        raise InputError(f"{path or 'the recipe'}: expected keys and values, got {entry!r}")
    if strange := [key for key in entry if not isinstance(key, str)]:
        raise InputError(f"{path}: keys are words, got {strange[0]!r}")
    _bounded(entry, path)
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for problem in error.errors():
            # A union reports each of its branches: one line a place is enough.
            lines.setdefault(_where(problem, path), _line(model, problem, path))
        raise InputError("\n".join(lines.values())) from None


def _bounded(value: Any, path: str) -> None:
    """Refuse infinity, and whole numbers that no tensor can hold."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        _bounded(part, dotted(path, [key]))
    if isinstance(value, (int, float)) and abs(value) > MOST:
        raise InputError(f"{path}: must be finite and below 2^63, got {value!r}")


def needs_parts(component: Any) -> bool:
    """Whether a component is made from networks besides the model: no entry and no name alone can give them."""
    if not dataclasses.is_dataclass(component):
        return False
    hints = typing.get_type_hints(component)
    return any(f.init and f.name != "model" and _holds_network(hints[f.name]) for f in dataclasses.fields(component))


def dotted(path: str, steps: Sequence[int | str]) -> str:
    """``attacks[2].eps`` from ``attacks[2]`` and ``("eps",)``."""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path


def _where(problem: Any, path: str) -> str:
    return dotted(path, [step for step in problem["loc"] if isinstance(step, int) or step.isidentifier()])


def _line(model: type[BaseModel], problem: Any, path: str) -> str:
    where = _where(problem, path)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known)) or 'none'}"
        word = problem["loc"][-1]
        return f"{where}: unknown key" + (
            renamed(word, FIELDS) if FIELDS.get(word, "").split(".")[0] in known else hint
        )
    if problem["type"] == "missing":
        return f"{where}: this key is needed"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}, got {problem['input']!r}"


def _known_keys(model: type[BaseModel], steps: Sequence[int | str]) -> list[str]:
    current: Any = model
    for step in steps:
        field = current.model_fields.get(step) if isinstance(step, str) and _is_model(current) else None
        current = next(filter(_is_model, _union(field.annotation)), None) if field is not None else current
    return list(current.model_fields) if _is_model(current) else []


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _written(component: type, given: dict[str, Any], path: str) -> dict[str, Any]:
    """Checked values, those of classes that read their entries themselves made already."""
    hints = typing.get_type_hints(component)
    made = dict(given)
    for name, value in given.items():
        reader, many = _reader(hints[name])
        where = f"{path}.{name}"
        if reader is not None and value is not None:
            made[name] = (
                tuple(reader.from_entry(v, f"{where}[{i}]") for i, v in enumerate(value))
                if many
                else reader.from_entry(value, where)
            )
    return made


def _reader(hint: Any) -> tuple[type[Written] | None, bool]:
    """The class of a field that reads its entries itself, and whether the field holds several."""
    for part in _union(hint):
        many = get_origin(part) in (tuple, Sequence)
        for cls in _union(get_args(part)[0]) if many else (part,):
            if isinstance(cls, type) and issubclass(cls, Written):
                return cls, many
    return None, False


def _construct(component: type, given: dict[str, Any]) -> Any:
    return component(**_arguments(component, given))


def _arguments(component: type, given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments from checked values; nested models become the dataclasses they stand for."""
    hints = typing.get_type_hints(component)
    made = {}
    for name, value in given.items():
        nested = _nested_class(hints[name])
        if isinstance(value, BaseModel) and nested is not None:
            inner = {key: getattr(value, key) for key in value.model_fields_set}
            # A nested entry changes the field's own default, key by key, not the nested class's.
            default = _default(component, name)
            built = _nested(nested, inner, name)
            changed = {key: getattr(built, key) for key in inner}
            value = built if default is None else dataclasses.replace(default, **changed)
        made[name] = value
    return made


def _nested(component: type, given: dict[str, Any], name: str) -> Any:
    try:
        return _construct(component, given)
    except FieldError as error:
        raise FieldError(component.__name__, f"{name}.{error.field}", error.problem) from error
    except InputError as error:
        raise FieldError(component.__name__, name, str(error)) from error


def _default(component: type, name: str) -> Any:
    for field in dataclasses.fields(component):
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return None


def _schema_type(hint: Any) -> Any:
    reader, many = _reader(hint)
    if reader is not None:
        optional = types.NoneType in _union(hint)
        return (list[Any] | None if optional else list[Any]) if many else Any
    nested = _nested_class(hint)
    if nested is not None:
        return model_of(nested) if nested is hint else model_of(nested) | None
    return hint


def _nested_class(hint: Any) -> type | None:
    """The dataclass of a field that is annotated with one, or with one or ``None``."""
    parts = [part for part in _union(hint) if part is not types.NoneType]
    alone = len(parts) == 1 and isinstance(parts[0], type) and dataclasses.is_dataclass(parts[0])
    return parts[0] if alone else None


def _union(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _holds_network(hint: Any) -> bool:
    """Whether a field holds a network, or a component that is made of one (an interpreter)."""
    for part in _union(hint):
        cls: Any = part if isinstance(part, type) else type(None)
        if issubclass(cls, nn.Module) or _has_network(cls):
            return True
        if get_origin(part) is tuple and any(_holds_network(a) for a in get_args(part) if a is not Ellipsis):
            return True
    return False


@cache
def _has_network(component: Any) -> bool:
    # What reads its entries itself is made of data, whatever the names are that its annotations use.
    if not dataclasses.is_dataclass(component) or issubclass(component, Written):  # type: ignore[arg-type]
        return False
    hints = typing.get_type_hints(component)
    parts = [part for field in dataclasses.fields(component) for part in _union(hints[field.name])]
    return any(isinstance(part, type) and issubclass(part, nn.Module) for part in parts)
