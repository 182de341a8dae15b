"""Every row against every column: systems, attacked inputs, cells, report. Resumable at every chunk of images."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import data as data_sets
from .. import files
from ..errors import DamagedFileError, doing, memory_advice
from ..recipe import check_data
from ..recipe.experiment import Column, Experiment, Recipe, Row
from ..training import Session
from .adversaries import Adversaries, Job
from .audit import audit, audited
from .cell import Trial, craft, goal_map, measure
from .costs import measure_costs
from .growing import claim
from .judged import Chunk, Pool, chunks, judged
from .machine import machine
from .origins import Origins
from .own_data import adversarys_own
from .prepared import Builder, Prepared, prepare
from .store import RunFolder
from .summaries import PICTURES, Summaries


def run(recipe: Recipe, out: str | Path, session: Session | None = None) -> int:
    """Run or resume a recipe in the directory ``out``, or let it grow; the number of cells that failed.

    Cells of other rows, columns and metrics of the same data, model and judged inputs are kept where they still hold.

    Raises:
        RunMismatchError: ``out`` stands on another foundation, or was made in another precision; a run that the session
            reuses was made by another version or of other data.
        InputError: data or weights that the recipe needs are missing.
        RunBusyError: another process writes ``out``.
    """
    session = session or Session()
    folder = RunFolder(Path(out))
    data = check_data(recipe)
    for other in session.reuse:
        RunFolder(other).same_data(data.digest)
    with folder.held(session.accelerator.is_main_process):
        return _run(recipe.named(data.features), data, folder, session)


def _run(named: Recipe, data: data_sets.Data, folder: RunFolder, session: Session) -> int:
    claim(named, folder, data, data.digest, session)
    session.folder, session.sets_aside = folder.training, True
    failed = 0
    if not finished(named, folder):
        builder = Builder(named, data, session)
        if session.accelerator.is_main_process:
            folder.same_weights(builder.weights)
        # Before anything else is trained: without an input to judge, all of it would be in vain.
        positions = folder.judged(
            builder.weights, lambda: judged([builder.model], data, named.evaluation, named.seed, session.device)
        )
        session.accelerator.wait_for_everyone()
        if session.accelerator.is_main_process:
            folder.note_judged(builder.weights, positions)
        prepared = prepare(builder, folder)
        failed = Matrix(named, folder, session, prepared, data, positions, session.device).fill()
        failed += audit(named, prepared, data, folder, session)
    conclude(folder, session, failed)
    return failed


def conclude(folder: RunFolder, session: Session, failed: int) -> None:
    """Write the report; drop the chunks, unless a cell failed that needs them yet."""
    if session.accelerator.is_main_process:
        from .report import write_report

        with doing("writing the report"):
            write_report(folder)
        if not failed:
            folder.drop_chunks("judged")
            folder.drop_chunks("attacked")
    session.accelerator.wait_for_everyone()


def finished(experiment: Experiment, folder: RunFolder) -> bool:
    """Whether every cell and every row's cost is there: nothing has to be trained or loaded again."""
    cells = [folder.done(row.label, column.label) for row in experiment.rows for column in experiment.columns]
    rows = all(folder.row(row.label).is_file() for row in experiment.rows)
    rows = rows and all(audited(folder, row) for row in experiment.rows if row.kind == "manipulation")
    return rows and all(cell is not None for cell in cells)


@dataclass
class Matrix:
    """The two nested loops: every row against every column, chunk by chunk.

    Args:
        experiment: rows, columns and how they are judged.
        folder: its directory.
        session: accelerator and progress.
        prepared: what is judged.
        data: the data set.
        positions: of the judged inputs in its test part.
        device: where the systems are.
    """

    experiment: Experiment
    folder: RunFolder
    session: Session
    prepared: Prepared
    data: data_sets.Data
    positions: Sequence[int]
    device: torch.device

    def fill(self) -> int:
        """Make every cell that is not there yet; the number of those that failed."""
        cells = [(row, column) for row in self.experiment.rows for column in self.experiment.columns]
        todo = [cell for cell in cells if not self._done(*cell)]
        if todo:
            self._fill(todo)
        if self.session.accelerator.is_main_process:
            self._summaries.compare_late()
            measure_costs(self._origins, self.prepared, self.data, self.folder, self.session, self._timed)
        self.session.accelerator.wait_for_everyone()
        return sum(not self._done(*cell) for cell in cells)

    def _done(self, row: Row, column: Column) -> bool:
        return self.folder.done(row.label, column.label) is not None

    def _fill(self, todo: list[tuple[Row, Column]]) -> None:
        made, pool = self._chunks, self._pool()
        jobs: dict[str, tuple[Job, Column]] = {}
        for row, column in todo:
            if self._adversaries.failure(row, column) is None:
                job = self._adversaries.job(row, column)
                jobs.setdefault(job.name, (job, column))
        if jobs:
            with self.session.progress.task("attacks", len(jobs) * len(made)) as advance:
                for name, (job, column) in jobs.items():
                    self._shard("attacked", name, self._crafter(job, column, pool), advance)
        with self.session.progress.task("cells", len(todo)) as advance:
            for row, column in todo:
                self._cell(row, column)
                advance(1)

    @cached_property
    def _adversaries(self) -> Adversaries:
        return Adversaries(self.experiment, self.prepared, self._origins)

    @cached_property
    def _origins(self) -> Origins:
        return Origins(self.experiment)

    @cached_property
    def _summaries(self) -> Summaries:
        return Summaries(self.experiment, self.folder, self._origins, machine(self.device.type))

    @cached_property
    def _chunks(self) -> list[Chunk]:
        return chunks(self.positions, self.data, self.experiment.evaluation, self.experiment.seed, self.device)

    @property
    def _timed(self) -> Tensor:
        """A batch of the test part, judged or not, for timing."""
        size = min(self.experiment.evaluation.batch_size, len(self.data.test))
        return data_sets.stack(data_sets.take(self.data.test, size, self.experiment.seed))[0].to(self.device)

    def _cell(self, row: Row, column: Column) -> None:
        failure = self._adversaries.failure(row, column)
        if failure is not None:
            self._write_failure(row, column, failure)
            return
        made_of = files.digest(self._origins.cell(row, column))
        name, judge = f"{row.label} / {column.label} {made_of[:8]}", self._judge(row, column)
        self._shard("judged", name, judge, lambda steps: None)
        if self.session.accelerator.is_main_process:
            try:
                parts = [self._read("judged", name, chunk) for chunk in self._chunks]
                arrays = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                shown = self.experiment.evaluation.pictures
                kept = {k: (v[:shown] if k in PICTURES else v) for k, v in arrays.items()}
                self.folder.write_cell(row.label, column.label, self._summaries.of(row, column, arrays), kept)
            except _ChunkFailedError as error:
                self._write_failure(row, column, str(error))
        self.session.accelerator.wait_for_everyone()

    def _judge(self, row: Row, column: Column) -> Callable[[Chunk], dict[str, Tensor]]:
        """What measures a chunk of a cell."""
        by_row, experiment = self.prepared.by_row, self.experiment
        system, job = by_row[row.label], self._adversaries.job(row, column)
        reference = by_row[experiment.reference(row).label].model
        honest = by_row[row.root] if experiment.manipulated(row) else None

        def judge(chunk: Chunk) -> dict[str, Tensor]:
            made = self._read("attacked", job.name, chunk)
            trial = Trial(system, column.attack, chunk, made, reference, honest)
            return measure(trial, experiment.metrics, experiment.evaluation.plausible)

        return judge

    def _shard(
        self, kind: str, name: str, make: Callable[[Chunk], dict[str, Tensor]], advance: Callable[[int], None]
    ) -> None:
        """Make every chunk that is not there yet: this process its share, the others theirs."""
        accelerator = self.session.accelerator
        for chunk in self._chunks:
            path = self.folder.chunk(kind, name, chunk.index)
            mine = chunk.index % accelerator.num_processes == accelerator.process_index
            if mine and not self._whole(path):
                try:
                    files.write_tensors(path, make(chunk))
                    self.folder.error(kind, name, chunk.index).unlink(missing_ok=True)
                except Exception as error:
                    if files.is_full(error):
                        raise
                    files.write_text(self.folder.error(kind, name, chunk.index), traceback.format_exc())
            advance(1)
        accelerator.wait_for_everyone()

    def _whole(self, path: Path) -> bool:
        """Whether a chunk is there; a damaged one is made anew."""
        if not path.is_file():
            return False
        try:
            files.read_metadata(path)
        except DamagedFileError as error:
            self.session.progress.say(f"damaged: {error}; it is made anew")
            return False
        return True

    def _read(self, kind: str, name: str, chunk: Chunk) -> dict[str, Tensor]:
        path, error = self.folder.chunk(kind, name, chunk.index), self.folder.error(kind, name, chunk.index)
        if path.is_file():
            return {k: v.to(chunk.x.device) for k, v in files.read_tensors(path)[0].items()}
        raise _ChunkFailedError(
            error.read_text(encoding="utf-8", errors="replace") if error.is_file() else f"{path} is missing"
        )

    def _crafter(self, job: Job, column: Column, pool: Pool) -> Callable[[Chunk], dict[str, Tensor]]:
        seed = self.experiment.seed
        ready = cache(lambda: job.attack.fitted(job.system, *self._fitting) if job.attack.needs_data else job.attack)

        def make(chunk: Chunk) -> dict[str, Tensor]:
            return craft(ready(), job.system, chunk, goal_map(column, job.system, chunk, pool, seed))

        return make

    def _pool(self) -> Pool:
        """Images for goal maps of other classes and for attacks to be fitted on; none where no column asks."""
        if any(column.goal_map == "random-class" for column in self.experiment.columns):
            return Pool(*self._fitting)
        return Pool(torch.empty(0), torch.empty(0, dtype=torch.int64))

    @cached_property
    def _fitting(self) -> tuple[Tensor, Tensor]:
        """The adversary's own images and labels: of the defense part, else of the train part."""
        x, y = adversarys_own(self.data, self.experiment.evaluation.pool, self.experiment.seed)
        return x.to(self.device), y.to(self.device)

    def _write_failure(self, row: Row, column: Column, why: str) -> None:
        # Where the file system has no locks, another run may have made it meanwhile.
        if self.session.accelerator.is_main_process and not self._done(row, column):
            last = why.strip().splitlines()[-1]
            advice = f" ({found})" if (found := memory_advice(last)) else ""
            self.session.progress.say(f"failed: {row.label} / {column.label}: {last}{advice}")
            summary = {"status": "failed", **self._summaries.where(row, column), "traceback": why}
            self.folder.write_cell(row.label, column.label, summary, None)


class _ChunkFailedError(Exception):
    """A chunk could not be made; the message is the traceback."""
