"""A run directory takes one experiment after another of one foundation: what still holds is kept, the rest dropped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..data import Data
from ..recipe.experiment import Experiment
from ..training import Session
from .circumstances import note_circumstances
from .mending import mend
from .origins import Origins
from .store import MADE_OF, UNSAVED, RunFolder, slug
from .summaries import Summaries


def claim(experiment: Experiment, folder: RunFolder, data: Data, digest: str, session: Session) -> None:
    """Claim a run directory, or go on in it; what was made of other rows, columns or metrics is dropped.

    Killed at any moment, the next call does the rest: what is stale goes before the recipe that it was made for.

    Args:
        experiment: what is to be run; columns of tables by their places.
        folder: its directory.
        data: the data set.
        digest: of the data set.
        session: its main process does it.

    Raises:
        RunMismatchError: the directory stands on another foundation.
    """
    if session.accelerator.is_main_process:
        folder.open(experiment, digest, data.features, data.shape, session.accelerator.mixed_precision)
        folder.note_machine(session.device.type)
        note_circumstances(folder, data, session.device.type)
        for line in mend(experiment, folder):
            session.progress.say(f"damaged: {line}")
        origins = Origins(experiment)
        found = _drop(experiment, folder, origins)
        if folder.keep(experiment) and found:
            for line in _said(found):
                session.progress.say(line)
        summaries = Summaries(experiment, folder, origins)
        summaries.refresh()
        summaries.compare_late()  # in case the process that made the last cell was killed before it did
    session.accelerator.wait_for_everyone()


def _said(found: Counter[str]) -> list[str]:
    other = f", {found['other']} made anew because their row or column changed" if found["other"] else ""
    lines = [f"{found['kept']} cells kept{other}"]
    if found["metrics"]:
        lines.append(f"metrics changed: {found['metrics']} cells are measured anew, their attacks included")
    if found["inputs"]:
        lines.append(f"other inputs are judged: {found['inputs']} cells are made anew")
    return lines


def _drop(experiment: Experiment, folder: RunFolder, origins: Origins) -> Counter[str]:
    """Drop what the experiment's rows and columns have under their labels of others; how many cells, and why."""
    found: Counter[str] = Counter()
    for row in experiment.rows:
        made_of = origins.row(row.label)
        audit = origins.audit(row.label) if row.kind == "manipulation" else ""
        sanity = folder.sanity(row.label, "").parent.glob(f"{slug(row.label)}--*.json")
        for path, now in ((folder.row(row.label), made_of), (folder.audit(row.label), audit),
                          (folder.calibration(row.label), origins.calibration(row.label)),
                          *((path, made_of) for path in sanity)):  # fmt: skip
            if path.is_file() and folder.read_part(path)["made_of"] != now:
                path.unlink()
        _system(folder.system(row.label), origins.system(row.label))
        for column in experiment.columns:
            cell = folder.done(row.label, column.label)
            if cell is not None:
                why = _why(cell["made_of"], origins.cell(row, column))
                found[why] += 1
                if why != "kept":
                    folder.cell(row.label, column.label).unlink()  # its arrays mean nothing without it
    return found


def _why(known: dict[str, Any], now: dict[str, Any]) -> str:
    """Whether a cell is kept, or why not; a metric that it has and nobody asks for does no harm."""
    if (known["row"], known["column"]) != (now["row"], now["column"]):
        return "other"
    if known["inputs"] != now["inputs"]:
        return "inputs"
    return "kept" if now["metrics"].items() <= known["metrics"].items() else "metrics"


def _system(path: Path, made_of: str) -> None:
    """Let a system be saved anew, unless it is of this very row."""
    mark = path / MADE_OF
    if path.is_dir() and not (mark.is_file() and mark.read_bytes() == made_of.encode()):
        for name in ("system.json", UNSAVED):
            (path / name).unlink(missing_ok=True)
