"""Data sets by name, in three disjoint parts: ``data.load("digits")`` has ``train``, ``defense`` and ``test``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from ..errors import InputError
from ..registry import DATASETS
from . import arrays, credit, csv_folder, folders, openml, tables
from .base import PARTS, Data, Item, Samples, Splits, has_labels, labels_of, stack, subset, take
from .findings import findings
from .inputs import InputSpec
from .pictures import decoded
from .tables import TensorTable

__all__ = [
    "PARTS",
    "Data",
    "InputSpec",
    "Item",
    "Samples",
    "Splits",
    "TensorTable",
    "arrays",
    "credit",
    "csv_folder",
    "decoded",
    "findings",
    "folders",
    "has_labels",
    "labels_of",
    "load",
    "openml",
    "stack",
    "subset",
    "tables",
    "take",
]


def load(
    name: str, *, root: str | PathLike[str] | None = None, size: int | None = None, seed: int = 0, **options: Any
) -> Data:
    """A data set by name, in three disjoint parts.

    Args:
        name: a registered name, or ``image-folder:PATH``, ``csv-folder:PATH``, ``csv-table:PATH``.
        root: where the data set is looked for (and downloaded to, with ``download=True``).
        size: side of the images in pixels; default the data set's own.
        seed: of the split. The same seed and data give the same parts, on any machine.
        options: further fields of the data set's class.

    Raises:
        UnknownNameError: with the nearest names.
        MissingDataError: if the data are not on this machine, with what to run to get them.
        InputError: for an option that the data set does not have, or data that are broken.

    Examples:
        >>> from robustexplain import data
        >>> digits = data.load("digits")
        >>> digits.shape, len(digits.train), len(digits.defense)
        ((1, 32, 32), 898, 540)
        >>> x, y = data.stack(data.take(digits.train, 4))
        >>> x.shape, y.shape
        (torch.Size([4, 1, 32, 32]), torch.Size([4]))
    """
    prefix, colon, path = name.partition(":")
    if colon and prefix in ("image-folder", "csv-folder", "csv-table"):
        name, options = prefix, {"path": path, **options}
    entry = DATASETS.get(name)
    given = {"root": None if root is None else fspath(root), "size": size}
    arguments = {"seed": seed, **{k: v for k, v in given.items() if v is not None}, **options}
    _check_options(name, arguments, inspect.signature(entry.build).parameters)
    data: Data = entry.build(**arguments).load()
    return data


def _check_options(name: str, given: Mapping[str, object], fields: Mapping[str, inspect.Parameter]) -> None:
    unknown = sorted(given.keys() - fields.keys())
    if unknown:
        raise InputError(f"data set {name!r} has no option {', '.join(unknown)}; it has: {', '.join(fields)}")
    missing = [field for field, p in fields.items() if p.default is inspect.Parameter.empty and field not in given]
    if missing:
        raise InputError(f"data set {name!r} needs {', '.join(missing)}")
