"""The calibrations of a run: every row once, in chunks that processes share, and what it makes plausible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .. import files
from ..errors import InputError, at_work, recorded
from ..recipe.experiment import Row
from ..training import Session
from .calibration import Calibration, Calibrator
from .cell import Rule
from .origins import Origins
from .prepared import Prepared
from .shards import ChunkFailedError, Shards
from .store import RunFolder


class Calibrations:
    """Calibrates the rows of an experiment.

    Args:
        origins: of the experiment: its rows and settings.
        prepared: their systems.
        folder: where files go.
        session: processes and progress.
    """

    def __init__(self, origins: Origins, prepared: Prepared, folder: RunFolder, session: Session) -> None:
        self.origins, self.prepared, self.folder, self.session = origins, prepared, folder, session
        self.evaluation = origins.experiment.evaluation
        self.shards = Shards(folder, session)

    @property
    def missing(self) -> list[Row]:
        """The rows that are not calibrated yet and can be."""
        rows = [row for row in self.origins.experiment.rows if row.label in self.prepared.by_row]
        wanted = self.evaluation.calibration > 0
        return [row for row in rows if wanted and not self.folder.calibration(row.label).is_file()]

    def make(self, rows: Sequence[Row], calibrator: Calibrator) -> None:
        """Calibrate some rows."""
        with self.session.progress.task("calibration", len(rows) * len(calibrator.draws)) as advance:
            for row in rows:
                measure = partial(calibrator.measure, self.prepared.by_row[row.label])
                with at_work(f"calibration of {row.label}"):
                    self.shards.make("calibrated", self._name(row), calibrator.draws, measure, advance)
                if self.session.accelerator.is_main_process:
                    self._write(row, calibrator)
        self.session.accelerator.wait_for_everyone()

    def _name(self, row: Row) -> str:
        return f"{row.label} {self.origins.calibration(row.label)[:8]}"

    def _write(self, row: Row, calibrator: Calibrator) -> None:
        error = self.folder.calibration(row.label).with_suffix(".error.txt")
        try:
            arrays = self.shards.read_all("calibrated", self._name(row), len(calibrator.draws))
            summary = calibrator.summary(arrays, self.evaluation.plausible)
        except (ChunkFailedError, InputError) as problem:
            why = recorded(problem) if isinstance(problem, InputError) else str(problem)
            self.session.progress.say(f"{row.label} is not calibrated: {why.strip().splitlines()[-1]}")
            files.write_text(error, why)
            return
        error.unlink(missing_ok=True)
        words = {"row": row.label, **summary, "made_of": self.origins.calibration(row.label)}
        self.folder.write_calibration(row.label, words, arrays)

    def failure(self, row: Row) -> str | None:
        """Why nothing can be told plausible in this row; ``None`` where it can."""
        path = self.folder.calibration(row.label)
        if self.evaluation.plausible.iou is not None or path.is_file():
            return None
        error = path.with_suffix(".error.txt")
        return error.read_text(encoding="utf-8") if error.is_file() else f"{path} is missing"

    def rule(self, row: Row) -> Rule:
        """What makes a map of this row plausible; of one without a :meth:`failure`."""
        plausible, known = self.evaluation.plausible, self.folder.calibrated(row.label)
        distance = None if known is None else plausible.metric
        if plausible.iou is not None:
            return Rule(distance, None, plausible.iou)
        assert known is not None  # or the row has a failure
        return Rule(distance, Calibration.read(*known).limit)
