"""The section ``scan`` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..fields import Count, Fraction
from ..registry import SCANNERS
from ..schema import make, model_of, validate
from .entries import split
from .scanning import Scanning


@dataclass(frozen=True)
class _Plain:
    """The keys of a recipe's ``scan`` that are not scanners."""

    models: Count = 12
    probe: Count = 64
    alarm: Fraction = 0.1


def scanning_of(entry: Any, path: str) -> Scanning:
    """What a recipe's ``scan`` says.

    Raises:
        InputError: an unknown scanner or setting, or two of one label.
    """
    entry = {} if entry is None else entry
    if not isinstance(entry, dict):
        raise InputError(f"{path}: expected keys and values, got {entry!r}")
    listed = entry.get("scanners") or []
    if not isinstance(listed, list):
        raise InputError(f"{path}.scanners: a list is needed, got {listed!r}")
    made: dict[str, Any] = {}
    for i, one in enumerate(listed):
        where = f"{path}.scanners[{i}]"
        found, own, extra = split(SCANNERS, one, where, ("label",))
        label = extra.get("label", found.name)
        if label in made:
            raise InputError(f"{where}: two are called {label!r}; give one of them another label")
        build: Any = found.build
        made[label] = make(build, own, where)
    plain = validate(model_of(_Plain), {k: v for k, v in entry.items() if k != "scanners"}, path)
    return Scanning(made, plain.models, plain.probe, plain.alarm)
