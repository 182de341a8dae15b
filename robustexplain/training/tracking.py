"""What a training says of its epochs: a history beside the checkpoint, and Accelerate's trackers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict, cast

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from .. import files
from ..errors import DamagedFileError, InputError, RobustExplainWarning, UnknownNameError

SUFFIX = ".history.json"
_EXTRAS = {"tensorboard": "robustexplain[tracking]"}


class EpochRecord(TypedDict):
    """One epoch: its number from 1, mean loss, last learning rate, and figures of the weights after it.

    A figure that is not finite is ``None``.
    """

    epoch: int
    loss: float
    lr: float
    figures: dict[str, float | None]


def record(epoch: int, loss: float, lr: float, figures: dict[str, float]) -> EpochRecord:
    """The record of an epoch."""
    known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {"epoch": epoch, "loss": loss, "lr": lr, "figures": known}


def write_history(checkpoint: Path, history: Sequence[EpochRecord]) -> None:
    """Write ``NAME.history.json`` beside a checkpoint, in one step."""
    files.write_json(history_of(checkpoint), list(history))


def history_of(checkpoint: Path) -> Path:
    """Where the history of a checkpoint stands."""
    return checkpoint.with_name(f"{checkpoint.stem}{SUFFIX}")


def histories(folder: str | Path) -> dict[str, list[EpochRecord]]:
    """The histories of all trainings below ``folder``, by name and the folders that it stands in: ``a1b2/rts``.

    One that is damaged is read from its checkpoint; where that is damaged as well, it is left out with a warning.
    """
    found = {}
    for path in sorted(Path(folder).rglob(f"*{SUFFIX}")):
        try:
            found[path.relative_to(folder).as_posix().removesuffix(SUFFIX)] = _history(path)
        except DamagedFileError as error:
            warnings.warn(f"left out: {error}", RobustExplainWarning, stacklevel=2)
    return found


def _history(path: Path) -> list[EpochRecord]:
    try:
        return _epochs(files.read_json(path), path)
    except DamagedFileError as error:
        checkpoint = path.with_name(f"{path.name.removesuffix(SUFFIX)}.safetensors")
        try:
            return _epochs(json.loads(files.read_metadata(checkpoint).get("history", "null")), path)
        except (DamagedFileError, ValueError):
            raise error from None


def _epochs(content: Any, path: Path) -> list[EpochRecord]:
    entries = content if isinstance(content, list) else [None]
    if not all(isinstance(entry, dict) and entry.keys() >= EpochRecord.__annotations__.keys() for entry in entries):
        raise DamagedFileError(f"{path} is damaged: it is no history of a training")
    return cast("list[EpochRecord]", entries)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate does not know, or whose package is not installed.

    Raises:
        InputError: naming what to install.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UnknownNameError("tracker", str(name), LOGGER_TYPE_TO_CLASS)
        if find_spec(name) is None:
            extra = _EXTRAS.get(name, name)
            raise InputError(f"the tracker {name!r} needs a package that is not installed: pip install '{extra}'")


@contextmanager
def tracked(names: Sequence[str], run: str, folder: Path | None) -> Iterator[Callable[[EpochRecord], None]]:
    """Trackers for the length of a training; the block gets a function that tells them of an epoch.

    Args:
        names: of Accelerate's trackers; each works on the main process alone.
        run: what they call the training.
        folder: where those that write files do so, in a folder of their own.

    Raises:
        InputError: a tracker that writes files, without a folder.
    """
    trackers = []
    for name in names:
        cls = LOGGER_TYPE_TO_CLASS[name]
        if cls.requires_logging_directory and folder is None:
            raise InputError(f"the tracker {name!r} writes files: the session needs a folder")
        trackers.append(cls(run, folder / name) if cls.requires_logging_directory and folder else cls(run))
    for tracker in trackers:
        # Older versions of Accelerate have no start(): there the constructor opens the run.
        getattr(tracker, "start", lambda: None)()

    def tell(epoch: EpochRecord) -> None:
        values = {"loss": epoch["loss"], "lr": epoch["lr"], **epoch["figures"]}
        for tracker in trackers:
            tracker.log({key: value for key, value in values.items() if value is not None}, step=epoch["epoch"])

    try:
        yield tell
    finally:
        for tracker in trackers:
            tracker.finish()
