"""An interpreter that is not built yet: its name and its settings, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from ..errors import InputError
from ..registry import INTERPRETERS, PARTS, Entry
from ..schema import needs_parts, settings_of
from .base import Interpreter

Scalar: TypeAlias = "bool | int | float | str | None"
Setting: TypeAlias = "Scalar | tuple[Scalar, ...]"
SpecLike: TypeAlias = "InterpreterSpec | type[Interpreter] | str | Mapping[str, Any]"
"""What a spec can be made from: a spec, a class, a name, or a mapping with a name and settings."""


@PARTS.register("interpreter-spec")
@dataclass(frozen=True)
class InterpreterSpec:
    """An interpreter by name, with settings of its own: ``InterpreterSpec("smoothgrad", {"samples": 20})``.

    Args:
        name: a registered name.
        settings: the interpreter's fields other than ``model``; a mapping becomes a sorted tuple of pairs.

    Raises:
        UnknownNameError: with the nearest names.
        InputError: a setting that the interpreter does not have, or a value that it cannot have.
    """

    name: str
    settings: Mapping[str, Setting] | tuple[tuple[str, Setting], ...] = ()

    def __post_init__(self) -> None:
        pairs = self.settings.items() if isinstance(self.settings, Mapping) else self.settings
        object.__setattr__(self, "settings", tuple(sorted((key, _plain(value)) for key, value in pairs)))
        self._checked(self.name)

    @classmethod
    def of(cls, value: SpecLike) -> InterpreterSpec:
        """The spec for a name, a class, a mapping with a ``name``, or a spec.

        Args:
            value: ``"gradcam"``, ``GradCAM``, ``{"name": "smoothgrad", "samples": 20}`` or a spec.

        Raises:
            InputError: for anything else, an unknown name or unknown settings.
        """
        if isinstance(value, InterpreterSpec):
            return value
        if isinstance(value, type) and issubclass(value, Interpreter):
            return cls(INTERPRETERS.name_of(value))
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(value["name"], {str(key): part for key, part in value.items() if key != "name"})
        raise InputError(f"an interpreter's name or class, or a mapping with a name, is needed, got {value!r}")

    @classmethod
    def from_entry(cls, entry: Any, path: str) -> InterpreterSpec:
        """As :meth:`of`, with errors that begin with ``path``."""
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry["name"] in INTERPRETERS:
            own = {key: value for key, value in entry.items() if key != "name"}
            build: Any = INTERPRETERS.get(entry["name"]).build
            settings_of(build, own, path)
        try:
            return cls.of(entry)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @property
    def entry(self) -> Entry:
        """Its entry in the registry."""
        return INTERPRETERS.get(self.name)

    @property
    def refusal(self) -> str | None:
        """Why it cannot be built from a model alone; ``None`` where it can."""
        if self.entry.train is not None:
            return f"{self.name!r} is trained: a recipe trains it, as a row of its own"
        if needs_parts(self.entry.build):
            return f"{self.name!r} is made of other parts besides the model, by a defense"
        return None

    def build(self, model: nn.Module) -> Interpreter:
        """The interpreter, explaining ``model``.

        Raises:
            InputError: the interpreter is trained, or needs other parts than a model.
        """
        if self.refusal is not None:
            raise InputError(self.refusal)
        interpreter: Interpreter = self.entry.build(model, **self._checked(self.name))
        return interpreter

    def _checked(self, path: str) -> dict[str, Any]:
        given = {key: list(v) if isinstance(v, tuple) else v for key, v in dict(self.settings).items()}
        if not given:
            # Only the name is checked: the fields of a trained interpreter need not be readable as settings.
            INTERPRETERS.get(self.name)
            return {}
        build: Any = self.entry.build
        return settings_of(build, given, path)

    def __str__(self) -> str:
        """The name, with the settings behind it: ``smoothgrad(samples=20)``."""
        settings = ", ".join(f"{key}={value!r}" for key, value in dict(self.settings).items())
        return f"{self.name}({settings})" if settings else self.name


def _plain(value: Any) -> Setting:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(v is None or isinstance(v, (bool, int, float, str)) for v in value):
        return tuple(value)
    raise InputError(f"a setting of an interpreter is a number, a word or a list of them, got {value!r}")
