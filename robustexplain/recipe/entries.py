"""Entries of a recipe: a name, or a mapping with a name, settings and what else its section takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ..data.own import OwnData
from ..errors import InputError
from ..metrics import JUDGED
from ..registry import DATASETS, METRICS, MODELS, Entry, Registry
from ..schema import make
from .experiment import Model

LONGEST = 100
"""Letters of a name or a label: both become names of files."""


def split(
    registry: Registry, entry: Any, path: str, extra: Sequence[str] = ()
) -> tuple[Entry, dict[str, Any], dict[str, Any]]:
    """The registry's entry that an entry names, its own settings, and the keys in ``extra`` that it also holds.

    Raises:
        InputError: no name, an unknown one, or a label that is no short text.
    """
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError(f"{path}: a name, or a mapping with a name, is needed, got {entry!r}")
    try:
        found = registry.get(entry["name"])
    except InputError as error:
        raise InputError(f"{path}.name: {error}") from None
    own = {key: value for key, value in entry.items() if key != "name" and key not in extra}
    given = {key: entry[key] for key in extra if key in entry}
    if "label" in given:
        short_text(given["label"], f"{path}.label")
    return found, own, given


def short_text(value: Any, path: str) -> str:
    """``value``, if it is a text of 1 to ``LONGEST`` letters.

    Raises:
        InputError: with ``path`` and what was found.
    """
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path}: a text is needed, got {value!r}")
    if not value.isprintable():
        raise InputError(f"{path}: letters, digits and signs on one line are allowed, got {value[:100]!r}")
    if len(value) > LONGEST:
        raise InputError(f"{path}: at most {LONGEST} letters are allowed, got {len(value)}: {value[:20]!r}...")
    return value


def data_set(entry: Any) -> Any:
    """The data set of a recipe, not loaded yet.

    Raises:
        InputError: none, an unknown one, or a setting that it does not have.
    """
    if entry is None:
        raise InputError("data: this key is needed")
    if isinstance(entry, dict) and "file" in entry:
        return make(OwnData, entry, "data")
    if isinstance(entry, str) and ":" in entry:
        prefix, _, rest = entry.partition(":")
        entry = {"name": prefix, "path": rest}
    elif isinstance(entry, dict) and ":" in str(entry.get("name", "")):
        prefix, _, rest = str(entry["name"]).partition(":")
        entry = {**entry, "name": prefix, "path": rest}
    found, own, _ = split(DATASETS, entry, "data")
    return make(_class(found), own, "data")


def model(entry: Any) -> Model:
    """The classifier of a recipe, not built yet.

    Raises:
        InputError: none, an unknown one, or an option that it does not have.
    """
    if entry is None:
        raise InputError("model: this key is needed")
    if isinstance(entry, dict) and isinstance(entry.get("output"), bool):
        raise InputError(f"model.output: the key or the place of an output is needed, got {entry['output']}")
    made: Model = make(Model, {"name": entry} if isinstance(entry, str) else entry, "model")
    if made.file is not None:
        if made.pretrained is not None:
            raise InputError("model.pretrained: code of one's own has no pretrained weights to load; give weights")
        return made
    if made.sha256 is not None:
        raise InputError("model.sha256: it is that of a file of one's own, and model.file is not given")
    try:
        build = MODELS.get(made.name.partition(":")[0]).build
    except InputError as error:
        raise InputError(f"model.name: {error}") from None
    for name in ("num_classes", "in_channels", "in_features"):
        if name in made.options:
            raise InputError(f"model.options.{name}: the data say it; leave it out, got {made.options[name]!r}")
    known = inspect.signature(build).parameters
    for name in made.options:
        if name not in known:
            raise InputError(f"model.options.{name}: {made.name} has no such option; it has {', '.join(known)}")
    return made


def metric(entry: Any, path: str) -> tuple[str, Any]:
    """A metric and its name.

    Raises:
        InputError: an unknown one, or one that a cell of the matrix cannot measure.
    """
    found, own, _ = split(METRICS, entry, path)
    cls = _class(found)
    if not issubclass(cls, JUDGED):
        raise InputError(f"{path}: {found.name} needs more than a cell has (see its documentation); use it in Python")
    return found.name, make(cls, own, path)


def _class(found: Entry) -> type:
    cls: Any = found.build
    assert isinstance(cls, type)
    return cls
