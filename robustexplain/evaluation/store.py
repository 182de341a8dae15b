"""The run directory: the only state of a run. Safe to kill at any moment; nothing half-written is ever read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import files, seals
from ..errors import DamagedFileError
from ..storage import checksum
from .identity import JUDGED, RUN, RunIdentity
from .judged import Chosen

MATRIX, REPORT = "matrix.csv", "report.html"
LABEL = "label.txt"
"""Beside a row's checkpoints: whose they are."""
UNSAVED = "not-saved.txt"
"""In place of a row's system that cannot be saved: why."""
MADE_OF = "made-of.txt"
"""Beside a row's system: the fingerprint of the row."""


def slug(text: str) -> str:
    """A label as part of a file name; distinct labels give distinct names."""
    plain = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    return f"{plain}-{files.digest(text)[:12]}"


@dataclass(frozen=True)
class RunFolder(RunIdentity):
    """Paths and files of one run.

    Args:
        root: the directory.
    """

    @property
    def training(self) -> Path:
        """Checkpoints."""
        return self.root / "training"

    def system(self, row: str) -> Path:
        """Where a row's system is saved."""
        return self.root / "systems" / slug(row)

    def chunk(self, kind: str, name: str, index: int) -> Path:
        """The file of one chunk of images: ``kind`` is ``attacked``, ``calibrated`` or ``judged``."""
        return self.root / kind / slug(name) / f"{index:05d}.safetensors"

    def error(self, kind: str, name: str, index: int) -> Path:
        """Where the traceback of a failed chunk is written."""
        return self.chunk(kind, name, index).with_suffix(".error.txt")

    def cell(self, row: str, column: str) -> Path:
        """The JSON file of a cell; its arrays stand beside it."""
        return self.root / "cells" / f"{slug(row)}--{slug(column)}.json"

    def row(self, row: str) -> Path:
        """The JSON file of a row: what the defense costs."""
        return self.root / "rows" / f"{slug(row)}.json"

    def calibration(self, row: str) -> Path:
        """The JSON file of a row's calibration on harmless changes; its arrays stand beside it."""
        return self.root / "calibrations" / f"{slug(row)}.json"

    def repeat(self, number: int) -> RunFolder:
        """The run in which everything is trained again, for the ``number``-th time; itself for 0."""
        return self if not number else RunFolder(self.root / "seeds" / str(number))

    def worst(self, row: str) -> Path:
        """The JSON file of a row's worst case over all columns; its arrays stand beside it."""
        return self.root / "worst" / f"{slug(row)}.json"

    def audit(self, row: str) -> Path:
        """The JSON file of a manipulated row's audit; its arrays stand beside it."""
        return self.root / "audits" / f"{slug(row)}.json"

    def sanity(self, row: str, check: str) -> Path:
        """The JSON file of one sanity check of one interpreter; its arrays stand beside it."""
        return self.root / "sanity" / f"{slug(row)}--{check}.json"

    def judged(self, made_of: str, choose: Callable[[], Chosen]) -> Chosen:
        """Positions of the judged inputs and others, as they were first chosen for what ``made_of`` is a hash of."""
        known = seals.read_or_none(self.root / JUDGED, "made_of", "positions", "beyond")
        if known is not None and known["made_of"] == made_of:
            return Chosen([int(p) for p in known["positions"]], [int(p) for p in known["beyond"]])
        return choose()

    def note_judged(self, made_of: str, chosen: Chosen) -> None:
        """Remember these positions."""
        known = {"made_of": made_of, "positions": list(chosen.judged), "beyond": list(chosen.beyond)}
        found = seals.read_or_none(self.root / JUDGED, *known)
        if found is None or {k: found[k] for k in known} != known:
            seals.write(self.root / JUDGED, known)

    def note_system(self, row: str) -> None:
        """Remember the checksum of a row's saved system."""
        known = self.run
        sums = {**known.get("systems", {}), slug(row): checksum(self.system(row))}
        if sums != known.get("systems"):
            seals.write(self.root / RUN, {**known, "systems": sums})

    def system_sum(self, row: str) -> str | None:
        """The checksum that a row's saved system must have, if it is known."""
        found = self.run.get("systems", {}).get(slug(row))
        return None if found is None else str(found)

    def unsaved(self, row: str) -> str | None:
        """Why a row's system could not be saved; ``None`` where it was, or was not tried yet."""
        path = self.system(row) / UNSAVED
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    def note_unsaved(self, row: str, why: str) -> None:
        """Note why a row's system could not be saved."""
        files.write_text(self.system(row) / UNSAVED, why)

    def done(self, row: str, column: str) -> dict[str, Any] | None:
        """The cell's JSON, or ``None`` if it is not there, or is a hole."""
        found = self.read_cell(row, column)
        return found if found is not None and found["status"] == "done" else None

    def read_cell(self, row: str, column: str) -> dict[str, Any] | None:
        """The cell's JSON, or ``None`` if it is not there yet.

        Raises:
            DamagedFileError: it is damaged, was changed, or is one of another place or run.
        """
        path = self.cell(row, column)
        if not path.is_file():
            return None
        found = seals.read(path, "row", "column", "run", "status", "made_of")
        if (found["row"], found["column"]) != (row, column) or found["run"] != self.identity:
            raise DamagedFileError(f"{path} is a cell of another place or of another run")
        return found

    def read_part(self, path: Path) -> dict[str, Any]:
        """The JSON of a row's cost, its audit or a sanity check, without its arrays.

        Raises:
            DamagedFileError: it is damaged, was changed, or is one of another place or run.
        """
        found = seals.read(path, "row", "run", "made_of")
        place = slug(found["row"]) + (f"--{found['check']}" if "check" in found else "")
        if path.stem != place or found["run"] != self.identity:
            raise DamagedFileError(f"{path} is a file of another place or of another run")
        return found

    def write_part(self, path: Path, content: dict[str, Any], arrays: Path | None = None) -> None:
        """Write a row's cost, its audit or a sanity check; the arrays that belong to it are there already."""
        seals.write(path, {**content, "run": self.identity}, arrays)

    def arrays(self, row: str, column: str) -> dict[str, Tensor]:
        """The cell's per-sample arrays.

        Raises:
            DamagedFileError: they are damaged, or were changed.
        """
        path = self.cell(row, column)
        self.check_arrays(seals.read(path), path)
        return files.read_tensors(path.with_suffix(".safetensors"))[0]

    @staticmethod
    def check_arrays(summary: dict[str, Any], path: Path) -> None:
        """Refuse arrays beside a JSON file that are not those it was written with."""
        seals.check_arrays(summary, path.with_suffix(".safetensors"))

    def calibrated(self, row: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What is known of a row's calibration, and its arrays; ``None`` if it is not there yet.

        Raises:
            DamagedFileError: it is damaged, or was changed.
        """
        path = self.calibration(row)
        if not path.is_file():
            return None
        known = seals.read(path)
        self.check_arrays(known, path)
        return known, files.read_tensors(path.with_suffix(".safetensors"))[0]

    def write_calibration(self, row: str, summary: dict[str, Any], arrays: dict[str, Tensor]) -> None:
        """Write a row's calibration: arrays first, so that one whose JSON is there is whole."""
        path = self.calibration(row)
        beside = path.with_suffix(".safetensors")
        files.write_tensors(beside, arrays)
        seals.write(path, {**summary, "run": self.identity}, beside)

    def write_cell(self, row: str, column: str, summary: dict[str, Any], arrays: dict[str, Tensor] | None) -> None:
        """Write a cell: arrays first, so that a cell whose JSON is there is whole."""
        path = self.cell(row, column)
        beside = path.with_suffix(".safetensors")
        if arrays is not None:
            files.write_tensors(beside, arrays)
        bound = beside if summary["status"] == "done" else None
        seals.write(path, {**summary, "run": self.identity}, bound)

    def drop_chunks(self, kind: str) -> None:
        """Remove the chunk files of a kind, once nothing needs them any more."""
        shutil.rmtree(self.root / kind, ignore_errors=True)
