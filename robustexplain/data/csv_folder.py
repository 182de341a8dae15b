"""Your own images with a CSV file of labels."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import InputError, MissingDataError
from ..fields import Count, Natural
from ..registry import DATASETS
from ..renamed import PARTS as RENAMED_PARTS
from ..renamed import renamed
from .base import PARTS, Data, Splits, checked_labels
from .csv_text import Line, check_csv, csv_lines
from .folders import Files, check_images, folder_at, of_files

MOST_CLASSES = 1_000_000
"""How many classes labels may stand for; more is a slip, such as another column."""


class _FileRow(NamedTuple):
    """A line of the CSV file; ``part`` is ``None`` without a column of parts."""

    file: str
    label: str
    part: str | None
    where: str


def _check_file(folder: Path, row: _FileRow) -> None:
    """Refuse a file outside of the folder, or that is not there. Links in the folder may lead anywhere."""
    name = row.file
    if not name or os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise InputError(f"{row.where} must name a file below {str(folder)!r}, got {name!r}")
    if not os.path.isfile(folder / name):
        hint = "; folders are separated by /" if "\\" in name else ""
        raise MissingDataError(f"csv-folder: {row.where} names {name!r}, which is not in {str(folder)!r}{hint}")


def _number(text: str) -> int | None:
    # int() also takes 1_0 for ten.
    return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None


@DATASETS.register("csv-folder")
@dataclass(frozen=True)
class CsvFolder:
    """Your own images: a folder, and a CSV file with a row an image that names the file and its class.

    Who goes into which part is decided by a hash of the file's name, so that parts stay when rows come or go, or by a
    column of the file.

    Args:
        path: the folder of the images.
        csv: the CSV file, relative to ``path``, with a header row.
        file_column: the column of file names, relative to ``path``.
        label_column: the column of labels: numbers from 0 to ``num_classes - 1``, or names of classes.
        part_column: the column that says ``train``, ``defense`` or ``test``, for a split that was published or that
            keeps relatives (crops of a photograph, images of a patient) together; ``seed`` and ``fractions`` have
            no say then.
        classes: names of the classes, in the order of the labels; default their numbers, or the names that stand
            there, sorted.
        num_classes: default as many as there are names, else the largest label plus 1.
        seed: of the split.
        size: side in pixels.
        resize: ``"squash"`` (whole image, proportions changed) or ``"crop"``.
        channels: 3 for colour, 1 for grey.
        fractions: expected shares of train, defense and test; ``(0, 0, 1)`` for a folder that is only judged on.
        delimiter: what stands between two columns.
        encoding: of the CSV file, such as ``latin-1``.
    """

    path: str
    csv: str = "labels.csv"
    file_column: str = "file"
    label_column: str = "label"
    part_column: str | None = None
    classes: tuple[str, ...] | None = None
    num_classes: Count | None = None
    seed: Natural = 0
    size: Count = 224
    resize: Literal["squash", "crop"] = "squash"
    channels: Literal[1, 3] = 3
    fractions: tuple[float, float, float] = (0.5, 0.3, 0.2)
    delimiter: str = ","
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        check_images(self)
        check_csv(self)
        if self.classes and self.num_classes not in (None, len(self.classes)):
            raise InputError(f"CsvFolder: num_classes is {self.num_classes}, but there are {len(self.classes)} classes")

    def load(self) -> Data:
        """Read the CSV file and list the images.

        Raises:
            MissingDataError: if the folder, the CSV file or an image is not there.
            InputError: for a file that is no CSV file of this encoding, a missing column, a file named twice or
                outside of the folder, or a label that is no class.
        """
        folder = folder_at(self.path, "csv-folder")
        rows = self._rows(folder / self.csv)
        names = [row.file for row in rows]
        for row in rows:
            _check_file(folder, row)
        labels, classes = self._labels(rows)
        checked_labels(labels, len(classes), str(folder / self.csv))
        dataset = Files(folder, names, labels, self.size, self.resize, self.channels)
        if self.part_column is None:
            splits = Splits.hashed(names, self.fractions, self.seed)
        else:
            splits = Splits.named([row.part for row in rows])
        return of_files(f"csv-folder:{folder.resolve().name}", classes, dataset, splits)

    def _rows(self, path: Path) -> list[_FileRow]:
        if not path.is_file():
            raise MissingDataError(f"csv-folder: no file {str(path)!r}; set csv to the file with the labels")
        lines = csv_lines(path, "csv-folder", self.encoding, self.delimiter)
        wanted = [column for column in (self.file_column, self.label_column, self.part_column) if column is not None]
        places = lines.places(wanted)
        rows = [self._row(line, places) for line in lines.rows()]
        if not rows:
            raise InputError(f"{str(path)!r} has no rows")
        seen: dict[str, str] = {}
        for row in rows:
            # ./a.png is a.png.
            before = seen.setdefault(os.path.normpath(row.file), row.where)
            if before is not row.where:
                raise InputError(f"{row.where} names a file twice: {row.file!r} stands in {before} already")
        return rows

    def _row(self, line: Line, places: dict[str, int]) -> _FileRow:
        part = line.cells[places[self.part_column]] if self.part_column else None
        if self.part_column and part not in PARTS:
            hint = renamed(part, RENAMED_PARTS)
            raise InputError(f"{line.where}: {self.part_column} must be one of {', '.join(PARTS)}, got {part!r}{hint}")
        file, label = line.cells[places[self.file_column]], line.cells[places[self.label_column]]
        return _FileRow(file, label.strip(), part, line.where)

    def _check_names(self, rows: list[_FileRow]) -> None:
        """Refuse classes named by numbers in another order: a label would be one class's number and another's name."""
        names = self.classes or ()
        for row in rows:
            if row.label in names and names.index(row.label) != int(row.label):
                raise InputError(
                    f"{row.where}: label {row.label!r} is the name of class {names.index(row.label)}, and a number: "
                    "give classes in the order of their numbers, or names that are no numbers"
                )

    def _labels(self, rows: list[_FileRow]) -> tuple[list[int], tuple[str, ...]]:
        """The class of each row, by number, and the names of the classes."""
        numbers = [_number(row.label) for row in rows]
        if any(number is not None for number in numbers):
            # One number among names, or the other way round, is a slip.
            for row, number in zip(rows, numbers, strict=True):
                if number is None:
                    raise InputError(f"{row.where}: label must be an integer, as on other lines, got {row.label!r}")
            labels = [number for number in numbers if number is not None]
            self._check_names(rows)
            count = self.num_classes or len(self.classes or ()) or max(labels) + 1
            if count > MOST_CLASSES:
                raise InputError(f"csv-folder: {count} classes; at most {MOST_CLASSES} are possible")
            return labels, tuple(self.classes or map(str, range(count)))
        classes = tuple(self.classes or sorted({row.label for row in rows}))
        for row in rows:
            if row.label not in classes or not row.label:
                raise InputError(f"{row.where}: label must be one of {', '.join(classes)}, got {row.label!r}")
        if self.num_classes not in (None, len(classes)):
            raise InputError(f"CsvFolder: num_classes is {self.num_classes}, but there are {len(classes)} classes")
        return [classes.index(row.label) for row in rows], classes
