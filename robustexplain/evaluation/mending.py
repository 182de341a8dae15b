"""Files of a run that are damaged or were changed: named, and made anew where they can be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .. import seals
from ..errors import DamagedFileError
from ..recipe.experiment import Experiment
from .store import RunFolder, slug


def mend(experiment: Experiment, folder: RunFolder) -> list[str]:
    """Remove damaged files of the experiment's cells, costs, calibrations, audits and sanity checks; a line on each.

    What is removed is made again by the run that goes on.
    """
    lines = []
    for row in experiment.rows:
        for column in experiment.columns:
            if why := damaged_cell(folder, row.label, column.label):
                folder.cell(row.label, column.label).unlink()
                lines.append(f"{why}; {row.label} / {column.label} is made anew")
        for path in _others(folder, row.label):
            if why := damaged(folder, path):
                path.unlink()
                lines.append(f"{why}; it is made anew")
    return lines


def damaged_cell(folder: RunFolder, row: str, column: str) -> str | None:
    """Why a cell, or the arrays beside it, cannot be used; ``None`` where it is in order or not there."""
    try:
        found = folder.read_cell(row, column)
        if found is not None and found["status"] == "done":
            folder.check_arrays(found, folder.cell(row, column))
    except DamagedFileError as error:
        return str(error)
    return None


def _others(folder: RunFolder, row: str) -> Iterator[Path]:
    yield folder.row(row)
    yield folder.audit(row)
    yield folder.calibration(row)
    yield from sorted(folder.sanity(row, "").parent.glob(f"{slug(row)}--*.json"))


def damaged(folder: RunFolder, path: Path) -> str | None:
    """Why a row's cost, audit or sanity check, or its arrays, cannot be used; ``None``: it is in order or not there."""
    if not path.is_file():
        return None
    try:
        found = folder.read_part(path)
        if seals.ARRAYS in found:
            seals.check_arrays(found, path.with_suffix(".safetensors"))
    except DamagedFileError as error:
        return str(error)
    return None
