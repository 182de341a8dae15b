"""Tables: rows of numbers held in memory, and your own from a CSV file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataWarning, InputError, MissingDataError
from ..fields import Count, Natural, check_fields
from ..registry import DATASETS
from .base import Data, Digest, Item, Splits, checked_fractions, checked_labels
from .csv_text import check_csv, codec, csv_lines, of_another_encoding
from .findings import warn_of_classes
from .frames import Encoding, encoded

Value: TypeAlias = str | bool | int | float
"""A value as it stands in a table; ``1``, ``1.0`` and ``"1"`` are the same."""


class TensorTable(Dataset[Item]):
    """A table's rows held in memory.

    Args:
        rows: float ``[N, D]``, finite, in the data's own units; kept as float32.
        labels: ``N`` classes.

    Raises:
        InputError: for rows of another shape, not finite, or of another number than the labels.
    """

    def __init__(self, rows: Tensor, labels: Sequence[int]) -> None:
        if rows.dim() != 2 or not rows.is_floating_point():
            raise InputError(f"rows must be floating point [N, D], got {rows.dtype} {list(rows.shape)}")
        if len(rows) != len(labels):
            raise InputError(f"a table needs a label a row, got {len(rows)} rows and {len(labels)} labels")
        self.rows = rows.to(torch.float32)
        if not torch.isfinite(self.rows).all():
            raise InputError("rows hold NaN, infinity or a number beyond float32")
        self.labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return self.rows[index], self.labels[index]

    @property
    def shape(self) -> tuple[int]:
        """``(D,)`` of an item."""
        return (self.rows.shape[1],)


def table(
    name: str,
    rows: Tensor,
    labels: Sequence[int],
    *,
    classes: Sequence[str],
    features: Sequence[str],
    fractions: Sequence[float] = (0.5, 0.3, 0.2),
    seed: int = 0,
) -> Data:
    """A data set from rows ``[N, D]``, in three stratified parts.

    Args:
        name: what reports call it.
        rows: float ``[N, D]``, finite, in the data's own units.
        labels: ``N`` classes.
        classes: their names.
        features: names of the columns.
        fractions: shares of train, defense and test.
        seed: of the split.

    Raises:
        InputError: for rows, labels or names that do not fit together, or fewer than two classes among the labels.
    """
    dataset = TensorTable(rows, labels)
    checked_labels(dataset.labels, len(classes), name)
    if len(set(dataset.labels)) < 2:
        found = sorted({classes[label] for label in dataset.labels})
        raise InputError(f"{name}: at least two classes are needed, got {found or 'no rows'}")
    splits = Splits.stratified(dataset.labels, fractions, seed)
    digest = Digest(dataset.rows, dataset.labels, tuple(classes), tuple(features), splits).hex()
    data = Data(name, tuple(classes), dataset.shape, *splits.of(dataset), digest, tuple(features))
    warn_of_classes(data)
    constant = [features[i] for i in (dataset.rows == dataset.rows[0]).all(0).nonzero().flatten().tolist()]
    if constant:
        shown = ", ".join(map(repr, constant[:6])) + (", ..." if len(constant) > 6 else "")
        warnings.warn(f"{name}: all rows have one value in {shown}: no feature; see drop", DataWarning, stacklevel=2)
    return data


@DATASETS.register("csv-table")
@dataclass(frozen=True, kw_only=True)
class CsvTable:
    """Your own table: a CSV file with a header, a row a sample. Also written ``csv-table:PATH``.

    Numbers stay in their own units (a model standardises by itself); a column of categories becomes a 0/1 column for
    each of its values, named ``column_value``, after the numeric columns. A column that is numbers, or dates, for most
    of its rows and has text in others is refused unless it stands in ``categories``.

    Args:
        path: the file.
        target: the column with the class.
        positive: the values of ``target`` that make class 1, all others being class 0; default: every value found is a
            class, in sorted order.
        drop: columns to leave out.
        categories: columns of categories; default: those that are not numbers.
        missing: ``refuse`` missing values, or leave out their rows or their columns.
        na: what a missing value is written as; default: what pandas takes for one, and ``?``.
        delimiter: what stands between two columns.
        encoding: of the file, such as ``latin-1``.
        most: the largest number of values that a column of categories (or ``target``) may have.
        fractions: shares of train, defense and test; the split is stratified.
        seed: of the split.
    """

    path: str
    target: str
    positive: Value | tuple[Value, ...] | None = None
    drop: tuple[str, ...] = ()
    categories: tuple[str, ...] | None = None
    missing: Literal["refuse", "drop-rows", "drop-columns"] = "refuse"
    na: tuple[str, ...] = (
        *("", "?", "NA", "N/A", "n/a", "#N/A", "#N/A N/A", "#NA", "<NA>", "NULL", "null", "None"),
        *("NaN", "nan", "NAN", "Nan", "-NaN", "-nan", "-1.#IND", "1.#IND", "-1.#QNAN", "1.#QNAN"),
    )
    delimiter: str = ","
    encoding: str = "utf-8"
    most: Count = 64
    fractions: tuple[float, float, float] = (0.5, 0.3, 0.2)
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)
        checked_fractions(self.fractions)
        check_csv(self)

    def load(self) -> Data:
        """Read and encode the file.

        Raises:
            MissingDataError: if there is no such file, or no pandas.
            InputError: for an empty file, another encoding, columns of one name, a column that is not there, text
                where numbers are expected, missing values, a continuous target or a single class.
        """
        path = Path(self.path).expanduser()
        frame = read_csv(path, "csv-table", self.delimiter, self.encoding, list(self.na))
        nameless = [c for c in frame.columns if c.startswith("Unnamed: ") and c not in self.drop]
        if nameless:
            warnings.warn(
                f"{str(path)!r}: a column without a name is read as {nameless[0]!r}; if it numbers the rows, put it "
                "into drop",
                DataWarning,
                stacklevel=2,
            )
        plan = Encoding(self.target, as_tuple(self.positive), self.drop, self.categories, self.missing, self.most)
        found = encoded(frame, plan, f"csv-table {str(path)!r}")
        return table(
            f"csv-table:{path.stem}",
            found.rows,
            found.labels,
            classes=found.classes,
            features=found.features,
            fractions=self.fractions,
            seed=self.seed,
        )


def as_tuple(positive: Value | tuple[Value, ...] | None) -> tuple[Value, ...] | None:
    """One value as a tuple of one."""
    return positive if positive is None or isinstance(positive, (tuple, list)) else (positive,)


def pandas_for(name: str) -> Any:
    """The pandas module, which reads tables.

    Raises:
        MissingDataError: if it is not installed, with what to run.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingDataError(f"{name} needs pandas: pip install 'robustexplain[tabular]'") from error
    return pandas


def read_csv(path: Path, name: str, delimiter: str = ",", encoding: str = "utf-8", na: list[str] | None = None) -> Any:
    """A CSV file as a data frame; a column without a name is called ``Unnamed: `` and its place.

    Args:
        path: the file.
        name: of the data set, in errors.
        delimiter: what stands between two columns.
        encoding: of the file.
        na: what a missing value is written as; default: what pandas takes for one, and ``?``.

    Raises:
        MissingDataError: if there is no such file, or no pandas.
        InputError: if it is empty, no CSV file, of another encoding, or has two columns of one name.
    """
    pandas = pandas_for(name)
    if not path.is_file():
        raise MissingDataError(f"{name}: no file {str(path)!r}; set path to the CSV file")
    # pandas renames columns of one name: the header is read before.
    header = csv_lines(path, name, encoding, delimiter).header
    columns = [column or f"Unnamed: {i}" for i, column in enumerate(header)]
    missing: dict[str, Any] = {"na_values": ["?"]} if na is None else {"na_values": na, "keep_default_na": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            # pandas would take a first column without a name for the rows' names, and cut rows that are too long.
            frame = pandas.read_csv(
                path, sep=delimiter, encoding=codec(encoding), header=0, names=columns, index_col=False,
                skipinitialspace=True, low_memory=False, **missing,
            )  # fmt: skip
    except UnicodeError as error:
        raise of_another_encoding(path, encoding, error) from error
    except (ValueError, OverflowError, OSError, pandas.errors.ParserWarning) as error:
        raise InputError(f"{name}: cannot read {str(path)!r}: {error}") from error
    if not len(frame):
        raise InputError(f"{name}: {str(path)!r} has a header ({len(frame.columns)} columns) and no rows")
    return frame
