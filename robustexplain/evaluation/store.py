"""The run directory: the only state of a run. Safe to kill at any moment; nothing half-written is ever read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from .. import files
from .._version import __version__
from ..errors import InputError, MissingDataError, RunMismatchError
from ..recipe.experiment import Experiment, Recipe, decisive

RUN, WEIGHTS, RECIPE, MATRIX, REPORT = "run.json", "weights.json", "recipe.yaml", "matrix.csv", "report.html"
LABEL = "label.txt"
"""Beside a row's checkpoints: whose they are."""
UNSAVED = "not-saved.txt"
"""In place of a row's system that cannot be saved: why."""
EXPERIMENT = "experiment.json"
"""What stands in place of the recipe where systems and attacks came from Python."""


def slug(text: str) -> str:
    """A label as part of a file name; distinct labels give distinct names."""
    plain = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    return f"{plain}-{files.digest(text)[:4]}"


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run.

    Args:
        root: the directory.
    """

    root: Path

    @property
    def training(self) -> Path:
        """Checkpoints."""
        return self.root / "training"

    def system(self, row: str) -> Path:
        """Where a row's system is saved."""
        return self.root / "systems" / slug(row)

    def chunk(self, kind: str, name: str, index: int) -> Path:
        """The file of one chunk of images: ``kind`` is ``attacked`` or ``judged``."""
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

    def audit(self, row: str) -> Path:
        """The JSON file of a manipulated row's audit; its arrays stand beside it."""
        return self.root / "audits" / f"{slug(row)}.json"

    def sanity(self, row: str, check: str) -> Path:
        """The JSON file of one sanity check of one interpreter; its arrays stand beside it."""
        return self.root / "sanity" / f"{slug(row)}--{check}.json"

    def open(
        self,
        experiment: Experiment,
        data_digest: str,
        features: Sequence[str] = (),
        shape: Sequence[int] = (),
        precision: str = "no",
    ) -> None:
        """Claim the directory for this experiment, or make sure that it is claimed for it already.

        Args:
            experiment: what decides the results.
            data_digest: of the data set.
            features: names of a table's columns.
            shape: of one input.
            precision: Accelerate's mixed precision, in which everything is trained.

        Raises:
            RunMismatchError: the directory holds another experiment, or one of another precision; the message says
                what differs.
        """
        kind = "recipe" if isinstance(experiment, Recipe) else "experiment"
        identity = {"version": __version__, "data": data_digest, kind: experiment.digest}
        known = self.root / RUN
        if known.is_file():
            before = json.loads(known.read_text(encoding="utf-8"))
            self._same(before, identity, experiment)
            self._same_precision(before.get("precision", "no"), precision)
        else:
            self._empty()
            words = {"name": experiment.name, "seed": experiment.seed, "libraries": _libraries()}
            words |= {"features": list(features), "shape": list(shape), "precision": precision}
            files.write_json(known, {**identity, **words})
        # After run.json, which claims the directory: a run that is killed in between is gone on with.
        path = self._source(experiment)
        if not path.is_file() and path.name == RECIPE:
            files.write_text(path, yaml.safe_dump(experiment.source, sort_keys=False))
        elif not path.is_file():
            files.write_json(path, experiment.source)

    def _source(self, experiment: Experiment) -> Path:
        return self.root / (RECIPE if isinstance(experiment, Recipe) else EXPERIMENT)

    def _empty(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root} is a file; --out needs a directory")
        if self.root.is_dir() and not all(path.match(f".{RUN}.*.part") for path in self.root.iterdir()):
            raise RunMismatchError(f"{self.root} is not empty and is no run directory; choose another --out")

    def same_weights(self, digest: str) -> None:
        """Remember the classifier's weights, or make sure that they are those the directory was made with.

        Raises:
            RunMismatchError: other weights, for example another version of a pretrained model.
        """
        path = self.root / WEIGHTS
        if not path.is_file():
            files.write_json(path, {"classifier": digest})
        elif json.loads(path.read_text(encoding="utf-8"))["classifier"] != digest:
            raise RunMismatchError(
                f"{self.root} was made with another classifier's weights; choose another --out, or delete the directory"
            )

    def _same(self, known: dict[str, Any], identity: dict[str, str], experiment: Experiment) -> None:
        differs = [key for key, value in identity.items() if known.get(key) != value]
        if not differs:
            return
        detail, path = "", self._source(experiment)
        if differs[-1] in ("recipe", "experiment") and path.is_file():
            before = _flat(decisive(yaml.safe_load(path.read_text(encoding="utf-8"))))  # JSON is YAML
            now = _flat(decisive(experiment.source))
            changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            detail = f" ({differs[-1]}: {', '.join(changed[:6])})"
        raise RunMismatchError(
            f"{self.root} holds another experiment: its {', '.join(differs)} differs{detail}; choose another --out, or "
            "delete the directory to start again"
        )

    def _same_precision(self, known: str, now: str) -> None:
        if known != now:
            raise RunMismatchError(
                f"{self.root} was made with mixed precision {known!r}, and this process has {now!r}; launch it with "
                f"--mixed_precision {known}, or choose another --out"
            )

    def same_data(self, data_digest: str) -> None:
        """Make sure that trainings of this run may be taken over by another one.

        Raises:
            MissingDataError: the directory holds no run.
            RunMismatchError: a run of another version, or of other data.
        """
        self.require()
        known = json.loads((self.root / RUN).read_text(encoding="utf-8"))
        wanted = {"version": __version__, "data": data_digest}
        if differs := [key for key, value in wanted.items() if known.get(key) != value]:
            raise RunMismatchError(f"nothing in {self.root} can be reused: its {' and '.join(differs)} differ")

    def unsaved(self, row: str) -> str | None:
        """Why a row's system could not be saved; ``None`` where it was, or was not tried yet."""
        path = self.system(row) / UNSAVED
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def note_unsaved(self, row: str, why: str) -> None:
        """Note why a row's system could not be saved."""
        files.write_text(self.system(row) / UNSAVED, why)

    def read_cell(self, row: str, column: str) -> dict[str, Any] | None:
        """The cell's JSON, or ``None`` if it is not there yet."""
        path = self.cell(row, column)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def arrays(self, row: str, column: str) -> dict[str, Tensor]:
        """The cell's per-sample arrays."""
        return files.read_tensors(self.cell(row, column).with_suffix(".safetensors"))[0]

    def write_cell(self, row: str, column: str, summary: dict[str, Any], arrays: dict[str, Tensor] | None) -> None:
        """Write a cell: arrays first, so that a cell whose JSON is there is whole."""
        path = self.cell(row, column)
        if arrays is not None:
            files.write_tensors(path.with_suffix(".safetensors"), arrays)
        files.write_json(path, summary)

    def drop_chunks(self, kind: str) -> None:
        """Remove the chunk files of a kind, once nothing needs them any more."""
        shutil.rmtree(self.root / kind, ignore_errors=True)

    def require(self) -> None:
        """Refuse a directory that holds no run."""
        if not (self.root / RUN).is_file():
            raise MissingDataError(
                f"{self.root} is no run directory: it has no {RUN}; make one with `robustexplain run`"
            )


def _libraries() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "accelerate", "timm", "numpy", "scikit-learn")}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}".strip(".")).items()}
    if isinstance(tree, list):
        return {k: v for i, value in enumerate(tree) for k, v in _flat(value, f"{path}[{i}]").items()}
    return {path: tree}
