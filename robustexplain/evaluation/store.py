"""The run directory: the only state of a run. Safe to kill at any moment; nothing half-written is ever read."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from torch import Tensor

from .. import files
from .._version import __version__
from ..errors import InputError, MissingDataError, RunMismatchError
from ..recipe.experiment import Experiment, Recipe, decisive, foundation
from .origins import weights_file

RUN, WEIGHTS, RECIPE, MATRIX, REPORT = "run.json", "weights.json", "recipe.yaml", "matrix.csv", "report.html"
LABEL = "label.txt"
"""Beside a row's checkpoints: whose they are."""
UNSAVED = "not-saved.txt"
"""In place of a row's system that cannot be saved: why."""
MADE_OF = "made-of.txt"
"""Beside a row's system: the fingerprint of the row."""
WORK = ("training", "attacked", "calibrated", "judged", "calibrations", "cells", "rows", "audits", "sanity")
"""Folders of what was trained, attacked or measured."""
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
        """Claim the directory for this experiment, or make sure that it stands on the same foundation.

        A directory in which nothing was trained or attacked yet is anybody's.

        Args:
            experiment: whose foundation must be the directory's.
            data_digest: of the data set.
            features: names of a table's columns.
            shape: of one input.
            precision: Accelerate's mixed precision, in which everything is trained.

        Raises:
            RunMismatchError: the directory holds another experiment, or one of another precision; the message says
                what differs.
        """
        kind = "recipe" if isinstance(experiment, Recipe) else "experiment"
        now = {"version": __version__, "data": data_digest, kind: files.digest(foundation(experiment.source))}
        known = self.run if (self.root / RUN).is_file() else None
        weights = weights_file(experiment)
        if known is not None:
            before = {"version": known["version"], "data": known["data"]}
            before |= {known["kind"]: known["foundation"]} if "foundation" in known else {}
            same_file = weights is None or known.get("weights_file") in (None, weights)
            if before == now and same_file:
                self._same_precision(known.get("precision", "no"), precision)
                if known.get("weights_file") is None and weights is not None:
                    files.write_json(self.root / RUN, {**known, "weights_file": weights})
                return
            if not self._untouched():
                if before == now:
                    raise RunMismatchError(self._other_weights)
                self._refuse(before, now, experiment)
            (self.root / WEIGHTS).unlink(missing_ok=True)
            shutil.rmtree(self.root / "systems", ignore_errors=True)
        else:
            self._empty()
        words = {"name": experiment.name, "seed": experiment.seed, "libraries": _libraries()}
        words |= {"features": list(features), "shape": list(shape), "precision": precision}
        words |= {} if weights is None else {"weights_file": weights}
        identity = {**now, kind: experiment.digest, "kind": kind, "foundation": now[kind]}
        files.write_json(self.root / RUN, {**identity, **words})

    def keep(self, experiment: Experiment) -> bool:
        """Keep the experiment's source in place of the directory's, whose former one is numbered; whether it differs.

        Only another description, or other sanity checks, replace it without a trace.
        """
        path = self.root / (RECIPE if isinstance(experiment, Recipe) else EXPERIMENT)
        other = self.root / (EXPERIMENT if isinstance(experiment, Recipe) else RECIPE)
        if other.is_file():
            other.rename(_numbered(other))
        before = self._source()
        differs = before is not None and files.digest(decisive(before)) != experiment.digest
        if differs:
            self._archive(path)
        if before is None or files.digest(before) != files.digest(experiment.source):
            if path.name == RECIPE:
                files.write_text(path, yaml.safe_dump(experiment.source, sort_keys=False))
            else:
                files.write_json(path, experiment.source)
        known = self.run
        now = {**known, "name": experiment.name, known["kind"]: experiment.digest}
        if now != known:
            files.write_json(self.root / RUN, now)
        return differs

    @property
    def run(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        found: dict[str, Any] = json.loads((self.root / RUN).read_text(encoding="utf-8"))
        return found

    def _source(self) -> dict[str, Any] | None:
        """What the directory was made from, as plain data."""
        path = next((p for p in (self.root / RECIPE, self.root / EXPERIMENT) if p.is_file()), None)
        return None if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML

    def _archive(self, path: Path) -> None:
        """A numbered copy, unless a run that was killed just made one."""
        text = path.read_text(encoding="utf-8")
        kept = [p.read_text(encoding="utf-8") for p in self.root.glob(f"{path.stem}.[0-9]*{path.suffix}")]
        if text not in kept:
            files.write_text(_numbered(path), text)

    def _empty(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root} is a file; --out needs a directory")
        if self.root.is_dir() and not all(path.match(f".{RUN}.*.part") for path in self.root.iterdir()):
            raise RunMismatchError(f"{self.root} is not empty and is no run directory; choose another --out")

    def _untouched(self) -> bool:
        """Whether nothing was trained, attacked or measured yet."""
        made = (path for name in WORK for path in (self.root / name).rglob("*"))
        return not any(path.suffix in (".safetensors", ".json") for path in made)

    def _refuse(self, before: dict[str, str], now: dict[str, str], experiment: Experiment) -> NoReturn:
        differs = [key for key, value in now.items() if before.get(key) != value]
        detail, source = "", self._source()
        if differs[-1] in before and differs[-1] in ("recipe", "experiment") and source is not None:
            old, new = _flat(foundation(source)), _flat(foundation(experiment.source))
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            detail = f" ({differs[-1]}: {', '.join(changed[:6])})" if changed else ""
        raise RunMismatchError(
            f"{self.root} holds another experiment: its {', '.join(differs)} differs{detail}; choose another --out, or "
            "delete the directory to start again"
        )

    def same_weights(self, digest: str) -> None:
        """Remember the classifier's weights, or make sure that they are those the directory was made with.

        Raises:
            RunMismatchError: other weights, for example another version of a pretrained model.
        """
        path = self.root / WEIGHTS
        if not path.is_file():
            files.write_json(path, {"classifier": digest})
        elif json.loads(path.read_text(encoding="utf-8"))["classifier"] != digest:
            raise RunMismatchError(self._other_weights)

    @property
    def _other_weights(self) -> str:
        return f"{self.root} was made with another classifier's weights; choose another --out, or delete the directory"

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

    def done(self, row: str, column: str) -> dict[str, Any] | None:
        """The cell's JSON, or ``None`` if it is not there, or is a hole."""
        found = self.read_cell(row, column)
        return found if found is not None and found["status"] == "done" else None

    def read_cell(self, row: str, column: str) -> dict[str, Any] | None:
        """The cell's JSON, or ``None`` if it is not there yet."""
        path = self.cell(row, column)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def arrays(self, row: str, column: str) -> dict[str, Tensor]:
        """The cell's per-sample arrays."""
        return files.read_tensors(self.cell(row, column).with_suffix(".safetensors"))[0]

    def calibrated(self, row: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What is known of a row's calibration, and its arrays; ``None`` if it is not there yet."""
        path = self.calibration(row)
        if not path.is_file():
            return None
        arrays = files.read_tensors(path.with_suffix(".safetensors"))[0]
        return json.loads(path.read_text(encoding="utf-8")), arrays

    def write_calibration(self, row: str, summary: dict[str, Any], arrays: dict[str, Tensor]) -> None:
        """Write a row's calibration: arrays first, so that one whose JSON is there is whole."""
        path = self.calibration(row)
        files.write_tensors(path.with_suffix(".safetensors"), arrays)
        files.write_json(path, summary)

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


def _numbered(path: Path) -> Path:
    """Beside a file, the same name with the next number that is free: ``recipe.1.yaml``."""
    return next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())


def _libraries() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "accelerate", "timm", "numpy", "scikit-learn")}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}".strip(".")).items()}
    if isinstance(tree, list):
        return {k: v for i, value in enumerate(tree) for k, v in _flat(value, f"{path}[{i}]").items()}
    return {path: tree}
