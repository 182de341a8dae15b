"""Run a recipe: systems, attacked inputs, cells, report. Resumable at every chunk of images; sharded over processes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data as data_sets
from .. import files
from ..attacks import Attack
from ..random_streams import derive
from ..recipe import check_data
from ..recipe.experiment import Column, Recipe, Row
from ..system import System
from ..training import Session
from .audit import audit, audited
from .cell import Chunk, Pool, craft, goal_classes, goal_map, measure
from .statistics import bootstrap, bootstrap_auc, paired
from .store import RunFolder
from .systems import Systems, clean_accuracy, prepare

PATIENCE = 10.0
"""Seconds after which a system's time is not measured again: twice is what it takes."""
PICTURES = ("x", "attacked_x", "map", "attacked_map", "goal_map")
LABELS = ("sample", "label", "prediction", "goal_class")


@dataclass(frozen=True)
class Job:
    """Attacked inputs to make: an attack on a system as the adversary takes it. Rows that share it share the inputs.

    Args:
        name: what the inputs are stored under.
        attack: the attack, adapted where the adversary adapts.
        system: what it is aimed at.
    """

    name: str
    attack: Attack
    system: System


def run(recipe: Recipe, out: str | Path, session: Session | None = None) -> int:
    """Run or resume a recipe in the directory ``out``; the number of cells that failed.

    Raises:
        RunMismatchError: ``out`` holds another experiment.
        InputError: data or weights that the recipe needs are missing.
    """
    session = session or Session()
    folder = RunFolder(Path(out))
    data = check_data(recipe)
    with _main_first(session):
        folder.open(recipe, data.digest, data.features)
    session.folder = folder.training
    failed = 0
    if not finished(recipe, folder):
        named = recipe.named(data.features)
        systems = prepare(named, data, folder, session)
        failed = Matrix(named, folder, session, systems, data).fill()
        failed += audit(named, systems, data, folder, session)
    if session.accelerator.is_main_process:
        from .report import write_report

        write_report(folder)
        if not failed:
            folder.drop_chunks("judged")
            folder.drop_chunks("attacked")
    session.accelerator.wait_for_everyone()
    return failed


def finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether every cell and every row's cost is there: nothing has to be trained or loaded again."""
    cells = [folder.read_cell(row.label, column.label) for row in recipe.rows for column in recipe.columns]
    rows = all(folder.row(row.label).is_file() for row in recipe.rows)
    rows = rows and all(audited(folder, row) for row in recipe.rows if row.kind == "manipulation")
    return rows and all(cell is not None and cell["status"] == "done" for cell in cells)


@dataclass
class Matrix:
    """The two nested loops: every row against every column, chunk by chunk.

    Args:
        recipe: the experiment.
        folder: its directory.
        session: accelerator and progress.
        systems: what is judged.
        data: the data set.
    """

    recipe: Recipe
    folder: RunFolder
    session: Session
    systems: Systems
    data: data_sets.Data

    def fill(self) -> int:
        """Make every cell that is not there yet; the number of those that failed."""
        cells = [(row, column) for row in self.recipe.rows for column in self.recipe.columns]
        todo = [cell for cell in cells if not self._done(*cell)]
        if todo:
            self._fill(todo)
        if self.session.accelerator.is_main_process:
            self._compare_late()
            self._costs()
        self.session.accelerator.wait_for_everyone()
        return sum(not self._done(*cell) for cell in cells)

    def _done(self, row: Row, column: Column) -> bool:
        known = self.folder.read_cell(row.label, column.label)
        return known is not None and known["status"] == "done"

    def _fill(self, todo: list[tuple[Row, Column]]) -> None:
        chunks, pool = self._chunks(), self._pool()
        jobs: dict[str, tuple[Job, Column]] = {}
        for row, column in todo:
            if self._failure(row, column) is None:
                job = self._job(row, column)
                jobs.setdefault(job.name, (job, column))
        work = [
            (f"attack {name}", "attacked", name, self._crafter(job, column, pool))
            for name, (job, column) in jobs.items()
        ]
        with self.session.progress.task("attacks", len(work) * len(chunks)) as advance:
            for _, kind, name, make in work:
                self._shard(kind, name, chunks, make, advance)
        with self.session.progress.task("cells", len(todo)) as advance:
            for row, column in todo:
                self._cell(row, column, chunks)
                advance(1)

    def _failure(self, row: Row, column: Column) -> str | None:
        """Why the judged system, or the one that is attacked in its place, could not be made."""
        failures = self.systems.failures
        return failures.get(row.label) or failures.get(column.source or row.label)

    def _cell(self, row: Row, column: Column, chunks: list[Chunk]) -> None:
        failure = self._failure(row, column)
        if failure is not None:
            self._write_failure(row, column, failure)
            return
        system, job = self.systems.systems[row.label], self._job(row, column)
        honest = self.systems.systems[row.root] if self.recipe.manipulated(row) else None

        def judge(chunk: Chunk) -> dict[str, Tensor]:
            made = self._read("attacked", job.name, chunk)
            return measure(system, chunk, made, self.recipe.metrics, self.recipe.evaluation, column.attack, honest)

        name = f"{row.label} / {column.label}"
        self._shard("judged", name, chunks, judge, lambda steps: None)
        if self.session.accelerator.is_main_process:
            try:
                parts = [self._read("judged", name, chunk) for chunk in chunks]
                arrays = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                self._write_cell(row, column, arrays)
            except _ChunkFailedError as error:
                self._write_failure(row, column, str(error))
        self.session.accelerator.wait_for_everyone()

    def _shard(
        self,
        kind: str,
        name: str,
        chunks: list[Chunk],
        make: Callable[[Chunk], dict[str, Tensor]],
        advance: Callable[[int], None],
    ) -> None:
        """Make every chunk that is not there yet: this process its share, the others theirs."""
        accelerator = self.session.accelerator
        for chunk in chunks:
            path = self.folder.chunk(kind, name, chunk.index)
            mine = chunk.index % accelerator.num_processes == accelerator.process_index
            if mine and not path.is_file():
                try:
                    files.write_tensors(path, make(chunk))
                    self.folder.error(kind, name, chunk.index).unlink(missing_ok=True)
                except Exception:
                    files.write_text(self.folder.error(kind, name, chunk.index), traceback.format_exc())
            advance(1)
        accelerator.wait_for_everyone()

    def _read(self, kind: str, name: str, chunk: Chunk) -> dict[str, Tensor]:
        path, error = self.folder.chunk(kind, name, chunk.index), self.folder.error(kind, name, chunk.index)
        if path.is_file():
            return {k: v.to(chunk.x.device) for k, v in files.read_tensors(path)[0].items()}
        raise _ChunkFailedError(error.read_text(encoding="utf-8") if error.is_file() else f"{path} is missing")

    def _crafter(self, job: Job, column: Column, pool: Pool) -> Callable[[Chunk], dict[str, Tensor]]:
        ready = cache(lambda: job.attack.fitted(job.system, *self._fitting) if job.attack.needs_data else job.attack)

        def make(chunk: Chunk) -> dict[str, Tensor]:
            return craft(ready(), job.system, chunk, goal_map(column, job.system, chunk, pool, self.recipe.seed))

        return make

    def _job(self, row: Row, column: Column) -> Job:
        """Whom the column's adversary attacks when this row is deployed, and with what."""
        target, base, attack = self.systems.systems[row.label], self.systems.systems[row.base], column.attack
        where = f"on {row.label}"
        if column.source is not None:
            target, where = self.systems.systems[column.source], f"on {column.source}"
        elif column.knowledge == "transfer":
            target, where = self.systems.replicas[row.root], f"from {row.root}"
        elif column.knowledge == "adaptive":
            attack = attack.adapted(target)
        elif row.kind == "defense":
            target = row.settings.oblivious_view(target, base)
            where = f"on {row.base}" if target.model is base.model else where
        if not attack.needs_maps and target.model is self.systems.model:
            where = "on the classifier"
        # Named by what decides the inputs, so that whoever asks for the same inputs shares them.
        made = files.digest([type(attack).__name__, asdict(attack), column.goal_map])
        return Job(f"{type(attack).__name__} {made} {where}", attack, target)

    def _chunks(self) -> list[Chunk]:
        """The judged images: the first of the test part's order, those that the classifier gets right."""
        settings, device = self.recipe.evaluation, self.session.device
        order = data_sets.take(self.data.test, len(self.data.test), self.recipe.seed)
        rows: list[int] = []
        for start in range(0, len(order), 64):
            if len(rows) >= settings.images:
                break
            positions = list(range(start, min(start + 64, len(order))))
            x, y = data_sets.stack(order, positions)
            with torch.no_grad():
                right = self.systems.model(x.to(device)).argmax(1).cpu() == y
            rows += [p for p, ok in zip(positions, right.tolist(), strict=True) if ok or not settings.only_correct]
        rows = rows[: settings.images]
        return [self._chunk(i, order, rows) for i in range(0, len(rows), settings.batch_size)]

    def _chunk(self, start: int, order: Any, rows: list[int]) -> Chunk:
        size = self.recipe.evaluation.batch_size
        mine = rows[start : start + size]
        x, y = (t.to(self.session.device) for t in data_sets.stack(order, mine))
        classes = self.data.num_classes
        goal = goal_classes(x, y, classes, self.recipe.seed, self.recipe.evaluation.targeted)
        return Chunk(start // size, x, y, goal, torch.tensor([order.indices[i] for i in mine], device=x.device))

    def _pool(self) -> Pool:
        """Images for goal maps of other classes and for attacks to be fitted on; none where no column asks."""
        if any(column.goal_map == "random-class" for column in self.recipe.columns):
            return Pool(*self._fitting)
        return Pool(torch.empty(0), torch.empty(0, dtype=torch.int64))

    @cached_property
    def _fitting(self) -> tuple[Tensor, Tensor]:
        """The adversary's own images and labels: of the defense part, else of the train part."""
        part = self.data.defense if len(self.data.defense) else self.data.train
        size = min(len(part), self.recipe.evaluation.pool)
        x, y = data_sets.stack(data_sets.take(part, size, self.recipe.seed))
        return x.to(self.session.device), y.to(self.session.device)

    def _write_cell(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> None:
        resamples, seed = self.recipe.evaluation.bootstrap, derive(self.recipe.seed, "statistics")
        measures = {
            name: bootstrap(value, resamples, seed).as_dict()
            for name, value in arrays.items()
            if name not in PICTURES and name not in LABELS
        }
        hits = arrays["success"] > 0
        on_hits = {name: bootstrap(arrays[name][hits], resamples, seed).as_dict() for name in self.recipe.metrics}
        summary: dict[str, Any] = {
            "status": "done",
            "row": row.label,
            "base": row.base,
            "column": column.label,
            "knowledge": column.knowledge,
            "measures": measures,
            "on_successes": on_hits,
            "against_undefended": self._against(row, column, arrays),
        }
        if "score" in arrays:
            measures["auc"] = bootstrap_auc(arrays["clean_score"], arrays["score"], resamples, seed).as_dict()
        shown = self.recipe.evaluation.pictures
        kept = {k: (v[:shown] if k in PICTURES else v) for k, v in arrays.items()}
        self.folder.write_cell(row.label, column.label, summary, kept)

    def _against(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> dict[str, Any]:
        """Paired differences to the undefended row: the same images under the same attacker."""
        if not row.derived or not self._done(_base_of(self.recipe, row), column):
            return {}
        plain = self.folder.arrays(row.base, column.label)
        names = [n for n in (*self.recipe.metrics, "success", "joint") if n in plain]
        resamples, seed = self.recipe.evaluation.bootstrap, derive(self.recipe.seed, "paired")
        return {name: paired(arrays[name], plain[name], resamples, seed).as_dict() for name in names}

    def _compare_late(self) -> None:
        """Compare the defended cells that were made while the undefended one was still a hole."""
        for row in self.recipe.rows:
            for column in self.recipe.columns:
                cell = self.folder.read_cell(row.label, column.label)
                if cell is None or cell["status"] != "done" or cell["against_undefended"]:
                    continue
                found = self._against(row, column, self.folder.arrays(row.label, column.label))
                if found:
                    self.folder.write_cell(row.label, column.label, {**cell, "against_undefended": found}, None)

    def _write_failure(self, row: Row, column: Column, why: str) -> None:
        if self.session.accelerator.is_main_process:
            self.session.progress.say(
                f"[red]failed[/red]: {row.label} / {column.label}: {why.strip().splitlines()[-1]}"
            )
            words = {"row": row.label, "base": row.base, "column": column.label, "knowledge": column.knowledge}
            self.folder.write_cell(row.label, column.label, {"status": "failed", **words, "traceback": why}, None)

    def _costs(self) -> None:
        """What each row costs: clean accuracy and time an input, measured once."""
        settings, device = self.recipe.evaluation, self.session.device
        todo = [row for row in self.recipe.rows if row.label in self.systems.systems]
        todo = [row for row in todo if not self.folder.row(row.label).is_file()]
        if not todo:
            return
        part = data_sets.take(self.data.test, min(settings.batch_size, len(self.data.test)), self.recipe.seed)
        x = data_sets.stack(part)[0].to(device)
        for row in todo:
            system = self.systems.systems[row.label]
            accuracy = clean_accuracy(system.model, self.data, settings.batch_size, 10_000, device)
            try:
                spent = milliseconds(system, x)
            except Exception as error:
                # Its cells are holes already, with the traceback; the other rows go on.
                self.session.progress.say(f"[red]no time for {row.label}[/red]: {error}")
                continue
            words = {"row": row.label, "base": row.base, "accuracy": accuracy, "ms": spent}
            files.write_json(self.folder.row(row.label), words)


class _ChunkFailedError(Exception):
    """A chunk could not be made; the message is the traceback."""


def _base_of(recipe: Recipe, row: Row) -> Row:
    return next(candidate for candidate in recipe.rows if candidate.label == row.base)


@torch.no_grad()
def milliseconds(system: System, x: Tensor, repeats: int = 5) -> float:
    """Median time of one call of the system over the batch, in ms an input; the first call is not counted."""
    times: list[float] = []
    while len(times) <= repeats and (len(times) < 2 or sum(times) < PATIENCE):
        _synchronise(x)
        start = time.perf_counter()
        system(x)
        _synchronise(x)
        times.append(time.perf_counter() - start)
    measured = sorted(times[1:])
    return 1e3 * measured[len(measured) // 2] / len(x)


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _main_first(session: Session) -> Any:
    return session.accelerator.main_process_first()
