"""The text of a CSV file: its encoding, its header, its lines."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError


class Line(NamedTuple):
    """A line of a CSV file; ``where`` is what errors call it."""

    cells: list[str]
    where: str


@dataclass(frozen=True)
class CsvLines:
    """A CSV file with a header.

    Args:
        path: the file.
        name: of the data set, in errors.
        encoding: of the file.
        delimiter: what stands between two columns.
        header: names of the columns, without spaces around them.
    """

    path: Path
    name: str
    encoding: str
    delimiter: str
    header: tuple[str, ...]

    def places(self, columns: Sequence[str]) -> dict[str, int]:
        """Which columns these are.

        Raises:
            InputError: one that is not there.
        """
        for column in columns:
            if column not in self.header:
                raise InputError(f"{str(self.path)!r} has no column {column!r}; it has {list(self.header)}")
        return {column: self.header.index(column) for column in columns}

    def rows(self) -> Iterator[Line]:
        """The lines below the header.

        Raises:
            InputError: a line with another number of cells than the header; text of another encoding.
        """
        lines = _lines(self.path, self.encoding, self.delimiter)
        next(lines, None)
        for line in lines:
            if len(line.cells) != len(self.header):
                raise InputError(f"{line.where} has {len(line.cells)} cells, and the header {len(self.header)}")
            yield line


def check_csv(component: Any) -> None:
    """Refuse a delimiter that is not one character, and an encoding that Python does not know.

    Raises:
        InputError: naming the field and the value.
    """
    cls = type(component).__name__
    if not isinstance(component.delimiter, str) or len(component.delimiter) != 1 or component.delimiter in '"\r\n':
        raise InputError(f"{cls}.delimiter must be one character, got {component.delimiter!r}")
    try:
        codecs.lookup(component.encoding)
        "".encode(component.encoding)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{cls}.encoding must be one such as utf-8 or latin-1, got {component.encoding!r}") from error


def codec(encoding: str) -> str:
    """The encoding, without the mark that some programs begin a file with."""
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def csv_lines(path: Path, name: str, encoding: str, delimiter: str) -> CsvLines:
    """A CSV file with its header.

    Raises:
        InputError: an empty file, text of another encoding, two columns of one name, another delimiter.
    """
    first = next(_lines(path, encoding, delimiter), None)
    if first is None:
        raise InputError(f"{name}: {str(path)!r} is empty")
    header = tuple(cell.strip() for cell in first.cells)
    twice = [column for column, count in Counter(header).items() if count > 1 and column]
    if twice:
        raise InputError(f"{name}: {str(path)!r}: two columns are called {twice[0]!r}")
    other = next((mark for mark in ",;\t|" if len(header) == 1 and mark != delimiter and mark in header[0]), None)
    if other is not None:
        raise InputError(f"{name}: {str(path)!r} has one column, {header[0]!r:.100}: set delimiter to {other!r}")
    return CsvLines(path, name, encoding, delimiter, header)


def of_another_encoding(path: Path, encoding: str, error: UnicodeError) -> InputError:
    """The error for text of another encoding, with what it may be."""
    with path.open("rb") as file:
        start = file.read(2)
    guess = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1 or cp1252"
    return InputError(
        f"{str(path)!r} is not of encoding {encoding}; set encoding to its own, such as {guess} ({error})"
    )


def _lines(path: Path, encoding: str, delimiter: str) -> Iterator[Line]:
    """Lines that are not empty."""
    number = 0
    try:
        with path.open(newline="", encoding=codec(encoding)) as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            for cells in reader:
                number = reader.line_num
                if cells:
                    yield Line(cells, f"{str(path)!r}, line {number}")
    except UnicodeError as error:
        raise of_another_encoding(path, encoding, error) from error
    except (OSError, csv.Error) as error:
        raise InputError(f"cannot read {str(path)!r} after line {number}: {error}") from error
