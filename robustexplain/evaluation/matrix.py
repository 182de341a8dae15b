"""Every row against every column: systems, attacked inputs, cells, report. Resumable at every chunk of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import data as data_sets
from .. import files
from ..errors import at_work, doing, memory_advice, recorded
from ..recipe import check_data, short_of_reach
from ..recipe.experiment import Column, Experiment, Recipe, Row
from ..training import Session
from .adversaries import Adversaries, Job
from .audit import audit, audited
from .auditor import Auditor
from .calibrating import Calibrations
from .calibration import calibrator
from .cell import Rule, Trial, craft, goal_map, measure
from .costs import measure_costs
from .flags import write_flags
from .growing import claim
from .judged import Chosen, Chunk, Chunks, Pool, choose
from .machine import machine
from .origins import Origins
from .own_data import adversarys_own
from .prepared import Builder, Prepared, prepare
from .probing import Probes
from .seeds import OverSeeds, again
from .shards import ChunkFailedError, Shards
from .store import RunFolder
from .summaries import PICTURES, Summaries
from .worst import write_worst


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
    for note in short_of_reach(recipe):
        session.progress.say(f"warning: {note}")
    return _run(recipe, data, folder, session)


def _run(recipe: Recipe, data: data_sets.Data, folder: RunFolder, session: Session) -> int:
    """The recipe, then the same with everything trained again, as often as it has ``seeds``."""
    named = recipe.named(data.features)
    with folder.held(session.accelerator.is_main_process):
        failed = _once(named, data, folder, session)
        for repeat in range(1, recipe.seeds):
            session.progress.say(f"training everything again: seed {repeat + 1} of {recipe.seeds}")
            failed += _run(again(recipe, repeat), data, folder.repeat(repeat), session)
        conclude(named, folder, session, failed)
    return failed


def _once(named: Recipe, data: data_sets.Data, folder: RunFolder, session: Session) -> int:
    claim(named, folder, data, data.digest, session)
    session.folder, session.sets_aside = folder.training, True
    failed = 0
    if not finished(named, folder):
        builder = Builder(named, data, session)
        if session.accelerator.is_main_process:
            folder.same_weights(builder.weights)
        # Before anything else is trained: without an input to judge, all of it would be in vain.
        chosen = folder.judged(
            builder.weights, lambda: choose([builder.model], data, named.evaluation, named.seed, session.device)
        )
        session.accelerator.wait_for_everyone()
        if session.accelerator.is_main_process:
            folder.note_judged(builder.weights, chosen)
        prepared = prepare(builder, folder)
        failed = Matrix(named, folder, session, prepared, data, chosen, session.device).fill()
        failed += audit(named, prepared, data, folder, session)
    return failed


def conclude(experiment: Experiment, folder: RunFolder, session: Session, failed: int) -> None:
    """Sum up over seeds and columns, write the report; drop the chunks, unless a cell failed that needs them yet."""
    if session.accelerator.is_main_process:
        from .report import write_report

        sum_up(experiment, folder)
        with doing("writing the report"):
            write_report(folder)
        if not failed:
            for kind in ("judged", "attacked", "calibrated"):
                folder.drop_chunks(kind)
    session.accelerator.wait_for_everyone()


def sum_up(experiment: Experiment, folder: RunFolder) -> None:
    """What stands on several cells: the seeds of each, and the worst case of each row."""
    OverSeeds(experiment, folder, Summaries(experiment, folder, Origins(experiment))).write()
    write_flags(experiment, folder)
    write_worst(experiment, folder)


def finished(experiment: Experiment, folder: RunFolder) -> bool:
    """Whether every cell and every row's cost is there: nothing has to be trained or loaded again."""
    cells = [folder.done(row.label, column.label) for row in experiment.rows for column in experiment.columns]
    rows = all(folder.row(row.label).is_file() for row in experiment.rows)
    if experiment.evaluation.plausible.iou is None:
        rows = rows and all(folder.calibration(row.label).is_file() for row in experiment.rows)
    rows = rows and all(audited(folder, row) for row in experiment.rows if row.kind == "manipulation")
    done = rows and all(cell is not None for cell in cells)
    return done and Probes(experiment, folder, Origins(experiment)).complete


@dataclass
class Matrix:
    """The two nested loops: every row against every column, chunk by chunk.

    Args:
        experiment: rows, columns and how they are judged.
        folder: its directory.
        session: accelerator and progress.
        prepared: what is judged.
        data: the data set.
        chosen: positions of the judged inputs in its test part, and of others for calibration.
        device: where the systems are.
    """

    experiment: Experiment
    folder: RunFolder
    session: Session
    prepared: Prepared
    data: data_sets.Data
    chosen: Chosen
    device: torch.device

    def fill(self) -> int:
        """Make every cell that is not there yet; the number of those that failed."""
        cells = [(row, column) for row in self.experiment.rows for column in self.experiment.columns]
        todo = [cell for cell in cells if not self.done(*cell)]
        self._calibrate()
        if todo:
            self._fill(todo)
        if self.session.accelerator.is_main_process:
            self._summaries.compare_late()
            measure_costs(self._origins, self.prepared, self.data, self.folder, self.session, self._timed)
        self.session.accelerator.wait_for_everyone()
        self._probe()
        return sum(not self.done(*cell) for cell in cells)

    def _probe(self) -> None:
        """Run what the audit of the cells needs."""
        probes = Probes(self.experiment, self.folder, self._origins)
        complete = probes.complete
        # All processes look before any of them makes what is missing: one that looked later would not take part.
        self.session.accelerator.wait_for_everyone()
        if not complete:
            Auditor(self, probes).run()
        self.session.accelerator.wait_for_everyone()

    def give_steps(self, row: Row, column: Column, steps: int) -> None:
        """Make a finished cell again with more steps of its attack; it says so (``raised``)."""
        asked = column.attack.steps
        more = replace(column, label=f"{column.label}, {steps} steps", attack=replace(column.attack, steps=steps))
        job = self.adversaries.job(row, more)
        self.shards.make("attacked", job.name, self.inputs, self.crafter(job, more, self.pool()))
        self._cell(row, column, job, {"asked": asked, "to": steps})
        if self.session.accelerator.is_main_process:
            self._compare_again(row, column)
            self.session.progress.say(f"{row.label} / {column.label}: {steps} steps win more; {asked} were asked for")
        self.session.accelerator.wait_for_everyone()

    def _compare_again(self, row: Row, column: Column) -> None:
        """Compare the cells of defended rows with the one that was made again."""
        for other in self.experiment.rows:
            cell = self.folder.done(other.label, column.label)
            if cell is not None and other.derived and self.experiment.reference(other).label == row.label:
                self.folder.write_cell(other.label, column.label, {**cell, "against_undefended": {}}, None)
        self._summaries.compare_late()

    def done(self, row: Row, column: Column) -> bool:
        """Whether a cell is there."""
        return self.folder.done(row.label, column.label) is not None

    def _fill(self, todo: list[tuple[Row, Column]]) -> None:
        made, pool = self.inputs, self.pool()
        jobs: dict[str, tuple[Job, Row, Column]] = {}
        for row, column in todo:
            if self._failure(row, column) is None:
                job = self.adversaries.job(row, column)
                jobs.setdefault(job.name, (job, row, column))
        if jobs:
            with self.session.progress.task("attacks", len(jobs) * len(made)) as advance:
                for name, (job, row, column) in jobs.items():
                    with at_work(f"{row.label} / {column.label}"):
                        self.shards.make("attacked", name, made, self.crafter(job, column, pool), advance)
        with self.session.progress.task("cells", len(todo)) as advance:
            for row, column in todo:
                self._cell(row, column)
                advance(1)

    def _calibrate(self) -> None:
        rows, (judged, beyond) = self._calibrations.missing, self.chosen
        if rows:
            settings, seed = self.experiment.evaluation, self.experiment.seed
            self._calibrations.make(rows, calibrator(self.data, settings, judged, beyond, seed, self.device))

    def _failure(self, row: Row, column: Column) -> str | None:
        """Why a cell cannot be made: its system, the calibration of its row, or its attack."""
        # Before the attack: one that knows the row's limit cannot be made without it.
        uncalibrated = None if row.label in self.prepared.failures else self._calibrations.failure(row)
        return uncalibrated or self.adversaries.failure(row, column)

    @cached_property
    def _calibrations(self) -> Calibrations:
        return Calibrations(self._origins, self.prepared, self.folder, self.session)

    @cached_property
    def shards(self) -> Shards:
        """The chunks of inputs that processes share."""
        return Shards(self.folder, self.session)

    @cached_property
    def adversaries(self) -> Adversaries:
        """Whom each adversary attacks, and by what."""
        return Adversaries(self.experiment, self.prepared, self._origins, self._calibrations.rule)

    @cached_property
    def _origins(self) -> Origins:
        return Origins(self.experiment)

    @cached_property
    def _summaries(self) -> Summaries:
        return Summaries(self.experiment, self.folder, self._origins, machine(self.device.type))

    @cached_property
    def inputs(self) -> Chunks:
        """What is judged."""
        return Chunks(self.chosen.judged, self.data, self.experiment.evaluation, self.experiment.seed, self.device)

    @property
    def _timed(self) -> Tensor:
        """A batch of the test part, judged or not, for timing."""
        size = min(self.experiment.evaluation.batch_size, len(self.data.test))
        return data_sets.stack(data_sets.take(self.data.test, size, self.experiment.seed))[0].to(self.device)

    def rule(self, row: Row) -> Rule:
        """What makes a map of a row plausible."""
        return self._calibrations.rule(row)

    def _cell(self, row: Row, column: Column, job: Job | None = None, raised: dict[str, int] | None = None) -> None:
        failure = self._failure(row, column)
        if failure is not None:
            self._write_failure(row, column, failure)
            return
        made_of = files.digest(self._origins.cell(row, column))
        name = " ".join([f"{row.label} / {column.label} {made_of[:8]}", *map(str, (raised or {}).values())])
        judge = self._judge(row, column, job or self.adversaries.job(row, column))
        with at_work(f"{row.label} / {column.label}"):
            self.shards.make("judged", name, self.inputs, judge)
        if self.session.accelerator.is_main_process:
            try:
                shown = dict.fromkeys(PICTURES, self.experiment.evaluation.pictures)
                arrays = self.shards.read_all("judged", name, len(self.inputs), shown)
                found = self._summaries.of(row, column, arrays) | ({} if raised is None else {"raised": raised})
                self.folder.write_cell(row.label, column.label, found, arrays)
            except Exception as error:
                if files.is_full(error):
                    raise
                known = isinstance(error, ChunkFailedError)
                self._write_failure(row, column, str(error) if known else recorded(error))
        self.session.accelerator.wait_for_everyone()

    def _judge(self, row: Row, column: Column, job: Job) -> Callable[[Chunk], dict[str, Tensor]]:
        """What measures a chunk of a cell."""
        judging = self.judging(row, column)
        return lambda chunk: judging(chunk, self.shards.read("attacked", job.name, chunk))

    def judging(self, row: Row, column: Column) -> Callable[[Chunk, dict[str, Tensor]], dict[str, Tensor]]:
        """What measures attacked inputs of a chunk on a row."""
        by_row, experiment = self.prepared.by_row, self.experiment
        system = by_row[row.label]
        reference = by_row[experiment.reference(row).label].model
        honest = by_row[row.root] if experiment.manipulated(row) else None
        rule = self._calibrations.rule(row)

        def judge(chunk: Chunk, made: dict[str, Tensor]) -> dict[str, Tensor]:
            trial = Trial(system, column.attack, chunk, made, reference, honest)
            return measure(trial, experiment.metrics, rule, experiment.seed)

        return judge

    def crafter(self, job: Job, column: Column, pool: Pool) -> Callable[[Chunk], dict[str, Tensor]]:
        """What attacks a chunk."""
        seed = self.experiment.seed
        ready = cache(lambda: job.attack.fitted(job.system, *self.fitting) if job.attack.needs_data else job.attack)

        def make(chunk: Chunk) -> dict[str, Tensor]:
            return craft(ready(), job.system, chunk, goal_map(column, job.system, chunk, pool, seed))

        return make

    def pool(self) -> Pool:
        """Images for goal maps of other classes and for attacks to be fitted on; none where no column asks."""
        if any(column.goal_map == "random-class" for column in self.experiment.columns):
            return Pool(*self.fitting)
        return Pool(torch.empty(0), torch.empty(0, dtype=torch.int64))

    @cached_property
    def fitting(self) -> tuple[Tensor, Tensor]:
        """The adversary's own images and labels: of the defense part, else of the train part."""
        x, y = adversarys_own(self.data, self.experiment.evaluation.pool, self.experiment.seed)
        return x.to(self.device), y.to(self.device)

    def _write_failure(self, row: Row, column: Column, why: str) -> None:
        # Where the file system has no locks, another run may have made it meanwhile.
        if self.session.accelerator.is_main_process and not self.done(row, column):
            last = why.strip().splitlines()[-1]
            advice = f" ({found})" if (found := memory_advice(last)) else ""
            self.session.progress.say(f"failed: {row.label} / {column.label}: {last}{advice}")
            summary = {"status": "failed", **self._summaries.where(row, column), "traceback": why}
            self.folder.write_cell(row.label, column.label, summary, None)
