"""The file that a training goes on from: weights, optimiser, history, choice of weights."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..errors import DamagedFileError, RobustExplainWarning, RunMismatchError
from .averaging import Average
from .glimpse import Glimpse, alike
from .intact import DIGEST, read_intact, with_digest
from .selection import Selection
from .tracking import EpochRecord, history_of, write_history


@dataclass
class Checkpoint:
    """What is written after each epoch and read back in place.

    Args:
        stamp: of the training; a checkpoint of another stamp is refused.
        glimpse: of its data; so is one of other data.
        precision: that it is trained in; so is one of another precision.
        module: what is trained.
        optimizer: with its moments.
        average: of the weights, or ``None``.
        selection: of an epoch, or ``None``.
        scaler: of half-precision gradients, or ``None``.
        best: the weights that were kept so far.
        least: their loss.
        begun: a digest of the weights before the training, where nothing else tells what is trained; else empty.
    """

    stamp: str
    glimpse: Glimpse
    precision: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None
    selection: Selection | None
    scaler: Any
    best: dict[str, Tensor]
    least: float = math.inf
    begun: str = ""

    def write(self, path: Path, history: list[EpochRecord]) -> None:
        """Write it aside and rename it, in one file; the history beside it."""
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items() if v is not None}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        meta = {"stamp": self.stamp, "precision": self.precision, "epochs": str(len(history))}
        meta |= {"history": json.dumps(history), "glimpse": json.dumps(self.glimpse), "begun": self.begun}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.values.items()}
            meta["updates"] = str(self.average.updates)
        if self.selection is not None:
            judged = {"least": self.least, "kept": self.selection.kept, "figures": self.selection.history}
            meta["selection"] = json.dumps(judged)
        if self.scaler is not None:
            meta["scaler"] = json.dumps(self.scaler.state_dict())
        files.write_tensors(path, tensors, with_digest(tensors, meta))
        write_history(path, history)

    def unfit(self, path: Path) -> str:
        """Why a file is none of this same training, whatever its precision; nothing where it is one."""
        try:
            return "" if self._same(read_intact(path)[1]) else "changed"
        except DamagedFileError as error:
            return f"has a damaged checkpoint ({error})"

    def _same(self, meta: dict[str, str]) -> bool:
        # One without a digest is of an earlier version.
        return DIGEST in meta and meta.get("stamp") == self.stamp and alike(json.loads(meta["glimpse"]), self.glimpse)

    def read(self, path: Path, device: torch.device) -> list[EpochRecord]:
        """Load it; the epochs it has behind it.

        Raises:
            RunMismatchError: it belongs to another training, or to one of another precision.
            DamagedFileError: it cannot be read, or was changed since it was written.
        """
        try:
            tensors, meta = read_intact(path)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}; delete it to train again") from error
        if not self._same(meta):
            raise RunMismatchError(
                f"{path} is a checkpoint of another training (other settings, seed, data or version); "
                "use another output folder, or delete this one to start again"
            )
        if ("selection" in meta) != (self.selection is not None):
            raise RunMismatchError(
                f"{path} is a checkpoint of another training: of one of the two the best epoch is kept, of the other "
                "the last; use another output folder, or delete this one to start again"
            )
        if (precision := meta["precision"]) != self.precision:
            raise RunMismatchError(
                f"{path} is a checkpoint of a training with mixed precision {precision!r}, and this process has "
                f"{self.precision!r}; launch it with --mixed_precision {precision}, or use another output folder"
            )
        self._load_module(path, _under("module.", tensors), meta.get("begun", ""))
        self._load_optimizer(tensors)
        if self.average is not None:
            self.average.updates = int(meta["updates"])
            self.average.values = {k: v.to(device) for k, v in _under("average.", tensors).items()}
        if self.selection is not None:
            judged = json.loads(meta["selection"])
            self.least, self.selection.kept = judged["least"], judged["kept"]
            self.selection.history[:] = judged["figures"]
            self.best = {k: v.to(device) for k, v in _under("best.", tensors).items()}
        if self.scaler is not None:
            self.scaler.load_state_dict(json.loads(meta["scaler"]))
        history: list[EpochRecord] = json.loads(meta["history"])
        return history

    def _load_module(self, path: Path, stored: dict[str, Tensor], begun: str) -> None:
        own = {name: tuple(value.shape) for name, value in self.module.state_dict().items()}
        if own != {name: tuple(value.shape) for name, value in stored.items()}:
            raise RunMismatchError(
                f"{path} is a checkpoint of another module: its weights have other names or shapes; use another output "
                "folder, or delete this one to start again"
            )
        if begun and self.begun and begun != self.begun:
            warnings.warn(
                f"{path} is of a training that began with other weights than this module's, and goes on from there; if "
                "it is to be another training, give it another name, folder or identity",
                RobustExplainWarning,
                stacklevel=6,
            )
        self.module.load_state_dict(stored)

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", tensors).items():
            index, word = key.split(".", 1)
            state.setdefault(int(index), {})[word] = value
        if state:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def set_aside(path: Path) -> None:
    """Rename a checkpoint and its history to ``NAME.safetensors.1``, or the next number that is free."""
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
    for file in (history_of(path), path):  # the checkpoint last: while it is there, this can be done again
        if file.is_file():
            file.rename(file.with_name(f"{file.name}.{number}"))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
