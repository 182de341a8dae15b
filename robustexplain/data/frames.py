"""From a data frame to numbers: which column is the class, what is a category, what is missing."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataWarning, InputError
from .cells import check_target, refuse_numbers_as_text

MOST_COLUMNS = 10_000
"""How many columns a table may have when its categories are 0/1 columns."""


@dataclass(frozen=True)
class Encoding:
    """How a data frame is read; the fields are those of :class:`robustexplain.data.tables.CsvTable`."""

    target: str
    positive: Sequence[Any] | None = None
    drop: tuple[str, ...] = ()
    categories: tuple[str, ...] | None = None
    missing: str = "refuse"
    most: int = 64


@dataclass(frozen=True)
class Encoded:
    """A data frame as numbers: rows float32 ``[N, D]``, the names of the columns, labels and class names."""

    rows: Tensor
    features: tuple[str, ...]
    labels: list[int]
    classes: tuple[str, ...]


def encoded(frame: Any, plan: Encoding, source: str) -> Encoded:
    """Rows and labels of a data frame.

    Args:
        frame: a pandas data frame.
        plan: which column is what.
        source: what errors call it.

    Raises:
        InputError: for what :class:`robustexplain.data.tables.CsvTable` refuses.
    """
    frame = frame.rename(columns=str)
    _check_columns(frame, plan, source)
    frame = _complete(frame.drop(columns=list(plan.drop)), plan, source)
    labels, classes = labelled(frame[plan.target], plan.positive, plan.most, f"{source}, column {plan.target!r}")
    x = frame.drop(columns=plan.target)
    _check_copies(x, frame[plan.target], source)
    features, rows = numeric(x, plan.categories, plan.most, source)
    return Encoded(rows, features, labels, classes)


def require_columns(frame: Any, wanted: Sequence[str], source: str) -> None:
    """Refuse a data frame without these columns.

    Raises:
        InputError: naming the first that is not there, and the near ones.
    """
    known = [str(column) for column in frame.columns]
    for column in wanted:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has: {_listed(known)}"
            raise InputError(f"{source}: no column {column!r}; {hint}")


def _check_columns(frame: Any, plan: Encoding, source: str) -> None:
    twice = sorted(set(frame.columns[frame.columns.duplicated()]))
    if twice:
        raise InputError(f"{source}: two columns are called {twice[0]!r}")
    require_columns(frame, [plan.target, *plan.drop, *(plan.categories or ())], source)
    if plan.target in plan.drop or plan.target in (plan.categories or ()):
        where = "drop" if plan.target in plan.drop else "categories"
        raise InputError(f"{source}: {plan.target!r} is the target and cannot be in {where}: it is no feature")
    both = sorted(set(plan.drop) & set(plan.categories or ()))
    if both:
        raise InputError(f"{source}: {both[0]!r} is both in drop and in categories")
    if len(frame.columns) - len(set(plan.drop)) < 2:
        raise InputError(f"{source}: no column is left besides the target {plan.target!r}")


def _complete(frame: Any, plan: Encoding, source: str) -> Any:
    """The frame without missing values."""
    absent = frame.isna()
    counts = {str(c): int(n) for c, n in absent.sum().items() if n}
    shown = _listed([f"{c} ({n}, first in sample {absent[c].to_numpy().argmax()})" for c, n in counts.items()])
    if not counts:
        return frame
    if plan.missing == "drop-rows":
        kept = frame[~absent.any(axis=1)]
        if not len(kept):
            raise InputError(f"{source}: every row misses a value ({shown}); set missing: drop-columns")
        return kept.infer_objects()
    if plan.missing == "refuse":
        raise InputError(
            f"{source}: values are missing: {shown} of {len(frame)} rows; set missing to drop-rows or "
            "drop-columns, or put the columns into drop; what is a value after all is left out of na"
        )
    if plan.target in counts:
        raise InputError(f"{source}: the target {plan.target!r} misses {counts[plan.target]} values; drop those rows")
    if len(counts) == len(frame.columns) - 1:
        raise InputError(f"{source}: every column misses values ({shown}); set missing: drop-rows")
    return frame.drop(columns=list(counts))


def labelled(column: Any, positive: Sequence[Any] | None, most: int, source: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels and class names of a column.

    Args:
        column: a pandas series without missing values.
        positive: the values that make class 1; ``None`` makes each value a class, in sorted order.
        most: the largest number of values.
        source: what errors call it.

    Raises:
        InputError: for a positive value that is not there, a single class, or too many values to be classes.
    """
    texts = [as_text(value) for value in column]
    found = _ordered(column)
    if positive is None and len(found) > most:
        raise InputError(
            f"{source}: {len(found)} different values, such as {_listed(found, 3)}, are more than the {most} classes "
            "that `most` allows: name the values of class 1 in positive, or use another target"
        )
    if positive is None:
        check_target(found, source)
    wanted = found if positive is None else list(dict.fromkeys(as_text(value) for value in positive))
    unknown = [value for value in wanted if value not in found]
    if unknown or not wanted:
        got = repr(unknown[0]) if unknown else "no value"
        raise InputError(f"{source}: positive names {got}, but the values are {_listed(found)}")
    rest = [value for value in found if value not in wanted]
    if len(found) < 2 or (positive is not None and not rest):
        raise InputError(f"{source}: at least two classes are needed, all rows have {_listed(found)}")
    if positive is None:
        return [found.index(text) for text in texts], tuple(found)
    name = " or ".join(wanted)
    return [int(text in wanted) for text in texts], (rest[0] if len(rest) == 1 else f"not {name}", name)


def numeric(x: Any, categories: Sequence[str] | None, most: int, source: str) -> tuple[tuple[str, ...], Tensor]:
    """Column names and rows ``[N, D]``: numeric columns first, then a 0/1 column for each value of each category.

    Raises:
        InputError: for text that is no category, numbers as text, a category of too many values, two columns that get
            one name, or a number that is not finite.
    """
    text = [c for c in x.columns if not _is_number(x[c])]
    chosen = text if categories is None else list(categories)
    for c in text:
        if c not in chosen:
            row = next(i for i, value in enumerate(x[c]) if not _parses(value))
            got = x[c].iloc[row]
            raise InputError(
                f"{source}: column {c!r} is not numeric: sample {row} holds {got!r}; put it into categories or drop"
            )
    for c in text if categories is None else ():
        refuse_numbers_as_text(x[c], str(c), source)
    columns = {str(c): np.asarray(x[c], dtype=np.float64) for c in x.columns if c not in chosen}
    for c in (c for c in x.columns if c in chosen):
        made = _one_hot(x[c], str(c), most, source)
        if twice := sorted(made.keys() & columns.keys()):
            raise InputError(
                f"{source}: a value of column {str(c)!r} would get the 0/1 column {twice[0]!r}, which is there "
                "already: rename a column, or put one into drop"
            )
        columns |= made
        if len(columns) > MOST_COLUMNS:
            raise InputError(f"{source}: more than {MOST_COLUMNS} columns; put columns of many categories into drop")
    for name, values in columns.items():
        # The largest number that float32 holds; beyond it a value would become infinite.
        if not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise InputError(f"{source}: column {name!r} holds a number that is not finite in float32")
        _warn_of_one_value(values, name, source)
    return tuple(columns), torch.from_numpy(np.stack(list(columns.values()), 1).astype(np.float32))


def _warn_of_one_value(values: np.ndarray[Any, Any], name: str, source: str) -> None:
    """Large numbers that differ by little, such as seconds since 1970, are one number in float32."""
    wide, narrow = (len(np.unique(part)) for part in (values, values.astype(np.float32)))
    if 2 * narrow <= wide:
        warnings.warn(
            f"{source}: column {name!r} has {wide} different values and {narrow} in float32, which keeps seven digits: "
            "subtract what they have in common, or take another unit",
            DataWarning,
            stacklevel=4,
        )


def _one_hot(column: Any, name: str, most: int, source: str) -> dict[str, np.ndarray[Any, Any]]:
    found = _ordered(column)
    if len(found) > most:
        odd = next((as_text(value) for value in column if not _parses(value)), found[0])
        raise InputError(
            f"{source}: column {name!r} has {len(found)} different values, such as {odd!r}, more than the {most} "
            "categories that `most` allows: put it into drop, or raise most"
        )
    texts = np.array([as_text(value) for value in column], dtype=object)
    return {f"{name}_{value}": (texts == value).astype(np.float64) for value in found}


def _check_copies(x: Any, target: Any, source: str) -> None:
    """Refuse a feature that equals the target: models would be perfect and explanations trivial."""
    texts = [as_text(value) for value in target]
    for c in x.columns:
        if [as_text(value) for value in x[c]] == texts:
            raise InputError(f"{source}: column {c!r} is a copy of the target {target.name!r}; put it into drop")


def as_text(value: Any) -> str:
    """A value as text, without blanks around it, and the same for ``1``, ``1.0`` and ``"1"``."""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (int, float, np.integer, np.floating)):
        try:
            number = float(value)
        except OverflowError:
            return str(value)
        return str(int(number)) if number.is_integer() else repr(number)
    return str(value).strip()


def _ordered(column: Any) -> list[str]:
    """The values found, as text: numbers by size, text by the alphabet."""
    values = {as_text(value) for value in column}
    # NaN has no place in an order by size, and a set has another order in every process.
    if all(_parses(value) and math.isfinite(float(value)) for value in values):
        return sorted(values, key=lambda value: (float(value), value))
    return sorted(values)


def _is_number(column: Any) -> bool:
    from pandas.api.types import is_numeric_dtype

    return bool(is_numeric_dtype(column))


def _parses(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _listed(words: Sequence[str], most: int = 8) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
