"""Trainings of other runs that are the same: their checkpoints are copied instead of made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import files
from ..errors import DamagedFileError, MissingDataError
from .glimpse import Glimpse, alike
from .intact import DIGEST, read_intact
from .tracking import write_history


@dataclass
class Shelf:
    """Checkpoints of other runs by stamp and precision, searched for once.

    Args:
        folders: run directories, or folders of checkpoints.

    Raises:
        MissingDataError: a folder that is not there.
    """

    folders: tuple[Path, ...]

    def __post_init__(self) -> None:
        for folder in self.folders:
            if not folder.is_dir():
                raise MissingDataError(f"nothing to reuse: no folder at {folder}")

    @cached_property
    def known(self) -> dict[tuple[str, str], Path]:
        """The file of each training; of several, the one with the most epochs behind it."""
        found: dict[tuple[str, str], tuple[int, Path]] = {}
        for path, meta in self._checkpoints():
            key, epochs = (meta["stamp"], meta["precision"]), int(meta["epochs"])
            if key not in found or epochs > found[key][0]:
                found[key] = epochs, path
        return {key: path for key, (_, path) in found.items()}

    def _checkpoints(self) -> Iterator[tuple[Path, dict[str, str]]]:
        for folder in self.folders:
            for path in sorted(folder.rglob("*.safetensors")):
                try:
                    meta = files.read_metadata(path)
                except DamagedFileError:
                    continue  # what cannot be read is trained again
                if meta.keys() >= {"stamp", "precision", "epochs", "glimpse", DIGEST}:
                    yield path, meta

    def take(self, stamp: str, glimpse: Glimpse, precision: str, path: Path) -> Path | None:
        """Copy the checkpoint of that training to ``path``, its history beside it; where it was, or ``None``."""
        source = self.known.get((stamp, precision))
        if source is None:
            return None
        try:
            meta = read_intact(source)[1]
        except DamagedFileError:
            return None  # trained again as well
        if not alike(json.loads(meta["glimpse"]), glimpse):
            return None
        files.replace_file(path, lambda aside: shutil.copyfile(source, aside))
        write_history(path, json.loads(meta["history"]))
        return source
