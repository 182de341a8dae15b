"""``--set key.path=value``: one value of a recipe changed from the command line."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InputError
from .yaml_file import load


def changed(tree: Any, change: str) -> Any:
    """The tree with one ``key.path=value`` applied."""
    where, equals, text = change.partition("=")
    if not equals or not where:
        raise InputError(f"--set takes key.path=value, got {change!r}")
    steps: list[int | str] = []
    for part in where.split("."):
        found = re.fullmatch(r"([^][]+)((?:\[\d+\])*)", part)
        if found is None:
            raise InputError(f"--set {change}: {part!r} is no key, nor a key with places in lists such as attacks[0]")
        steps += [found[1], *(int(place) for place in re.findall(r"\d+", found[2]))]
    try:
        value = load(text)
    except InputError as error:
        raise InputError(f"--set {change}: the value {error}") from None
    return _put(tree, steps, value, change)


def _put(tree: Any, steps: list[int | str], value: Any, change: str) -> Any:
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        if not isinstance(tree, list) or step >= len(tree):
            raise InputError(f"--set {change}: there is no entry [{step}]")
        return [_put(item, rest, value, change) if i == step else item for i, item in enumerate(tree)]
    if isinstance(tree, str):
        tree = {"name": tree}
    if tree is not None and not isinstance(tree, dict):
        raise InputError(f"--set {change}: {step!r} is no key of {type(tree).__name__}")
    return {**(tree or {}), step: _put((tree or {}).get(step), rest, value, change)}
