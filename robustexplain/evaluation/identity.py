"""What a run directory is made of, in ``run.json``: claimed by one experiment, held by one process at a time."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .. import files, seals
from .._version import __version__
from ..errors import DamagedFileError, InputError, MissingDataError, RunMismatchError
from ..recipe.experiment import Experiment, Recipe, decisive, foundation
from ..recipe.yaml_file import load
from .lock import LOCK, held
from .machine import libraries, machine
from .origins import weights_file

RUN, WEIGHTS, RECIPE = "run.json", "weights.json", "recipe.yaml"
JUDGED = "judged.json"
"""Which inputs are judged, chosen once: on another machine a classifier may get others right."""
WORK = ("training", "attacked", "calibrated", "judged", "calibrations", "cells", "rows", "audits", "sanity", "scans")
"""Folders of what was trained, attacked or measured."""
EXPERIMENT = "experiment.json"
"""What stands in place of the recipe where systems and attacks came from Python."""


@dataclass(frozen=True)
class RunIdentity:
    """What a run directory is made of, and who writes it.

    Args:
        root: the directory.
    """

    root: Path

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
            before |= {known["kind"]: known["foundation"]}
            same_file = weights is None or known.get("weights_file") in (None, weights)
            if before == now and same_file:
                self._same_precision(known.get("precision", "no"), precision)
                if known.get("weights_file") is None and weights is not None:
                    seals.write(self.root / RUN, {**known, "weights_file": weights})
                return
            if not self._untouched():
                if before == now:
                    raise RunMismatchError(self._other_weights)
                self._refuse(before, now, experiment)
            for name in (WEIGHTS, JUDGED):
                (self.root / name).unlink(missing_ok=True)
            shutil.rmtree(self.root / "systems", ignore_errors=True)
        else:
            self._empty()
        words = {"name": experiment.name, "seed": experiment.seed, "libraries": libraries()}
        words |= {"features": list(features), "shape": list(shape), "precision": precision}
        words |= {} if weights is None else {"weights_file": weights}
        identity = {**now, kind: experiment.digest, "kind": kind, "foundation": now[kind]}
        seals.write(self.root / RUN, {**identity, **words})

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
        now["source"] = files.digest(experiment.source)
        if now != known:
            seals.write(self.root / RUN, now)
        return differs

    @property
    def run(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises:
            DamagedFileError: it is damaged, or was changed; nothing can tell then what the directory holds.
        """
        try:
            return seals.read(self.root / RUN, "version", "data", "kind", "foundation")
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{error}; it says what the run is: restore it from a copy, or choose another --out"
            ) from None

    @property
    def identity(self) -> str:
        """A hash of what its cells stand on: data, model, seed, which inputs are judged."""
        known = self.run
        return files.digest([known["version"], known["data"], known["foundation"]])

    def source(self) -> dict[str, Any]:
        """The recipe or the experiment that its results belong to, as plain data.

        Raises:
            DamagedFileError: it is missing or damaged, or was changed since the run.
        """
        path = next((p for p in (self.root / RECIPE, self.root / EXPERIMENT) if p.is_file()), self.root / RECIPE)
        if not path.is_file():
            raise DamagedFileError(f"{path} is missing: `robustexplain run` with the same recipe writes it again")
        try:
            found = load(path.read_text(encoding="utf-8")) if path.name == RECIPE else files.read_json(path)
        except ValueError as error:
            why = " ".join(str(error).removeprefix(f"{path} is damaged: ").split())
            raise DamagedFileError(
                f"{path} is damaged: {why}; `robustexplain run` with the same recipe writes it again"
            ) from None
        if self.run.get("source") not in (None, files.digest(found)):
            raise DamagedFileError(
                f"{path} was changed since the run: its cells are of another recipe than it says; `robustexplain run` "
                "with the recipe that you mean makes what is missing, and writes it again"
            )
        return dict(found)

    def _source(self) -> dict[str, Any] | None:
        """What the directory says that it was made from, as plain data; ``None`` where that is missing or damaged."""
        path = next((p for p in (self.root / RECIPE, self.root / EXPERIMENT) if p.is_file()), None)
        try:
            found = None if path is None else load(path.read_text(encoding="utf-8"))  # JSON is YAML
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _archive(self, path: Path) -> None:
        """A numbered copy, unless a run that was killed just made one."""
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        kept = [p.read_bytes() for p in self.root.glob(f"{path.stem}.[0-9]*{path.suffix}") if p.is_file()]
        if text.encode() not in kept:
            files.write_text(_numbered(path), text)

    def _empty(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root} is a file; --out needs a directory")
        if self.root.is_dir() and not all(map(_no_content, self.root.iterdir())):
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
        known = seals.read_or_none(path, "classifier")
        if known is None:
            seals.write(path, {"classifier": digest})
        elif known["classifier"] != digest:
            raise RunMismatchError(self._other_weights)

    def note_machine(self, device: str) -> None:
        """Remember on what kind of machine the run goes on."""
        known, here = self.run, machine(device)
        if here not in known.get("machines", []):
            seals.write(self.root / RUN, {**known, "machines": [*known.get("machines", []), here]})

    @property
    def _other_weights(self) -> str:
        return (
            f"{self.root} was made with another classifier's weights (another file, another version of a pretrained "
            "model, or weights drawn or trained again on another kind of machine); choose another --out, or delete the "
            "directory"
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
        known = self.run
        wanted = {"version": __version__, "data": data_digest}
        if differs := [key for key, value in wanted.items() if known.get(key) != value]:
            raise RunMismatchError(f"nothing in {self.root} can be reused: its {' and '.join(differs)} differ")

    @contextmanager
    def held(self, writes: bool) -> Iterator[None]:
        """Hold the directory for the length of the block, if this process is the one that ``writes``.

        Raises:
            RunBusyError: another process holds it.
            RunMismatchError: it holds something that is no run.
        """
        if not writes:
            yield
            return
        if not (self.root / RUN).is_file():
            self._empty()
        with held(self.root):
            yield

    def require(self) -> None:
        """Refuse a directory that holds no run."""
        if not (self.root / RUN).is_file():
            raise MissingDataError(
                f"{self.root} is no run directory: it has no {RUN}; make one with `robustexplain run`"
            )


def _numbered(path: Path) -> Path:
    """Beside a file, the same name with the next number that is free: ``recipe.1.yaml``."""
    return next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())


def _no_content(path: Path) -> bool:
    """Whether a file is one that a run leaves before it claims a directory."""
    return path.name == LOCK or path.match(f".{RUN}.*.part")


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}".strip(".")).items()}
    if isinstance(tree, list):
        return {k: v for i, value in enumerate(tree) for k, v in _flat(value, f"{path}[{i}]").items()}
    return {path: tree}
