"""Runs what the audit of the cells needs: of each row with a finished cell, and of each attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attacks import Attack, Linf
from ..metrics import MapMetric
from ..recipe.experiment import Column, Row
from .adversaries import Job
from .cell import goal_map
from .controls import best_random, other_weights, with_frozen_draws
from .judged import Chunk
from .planted import plant, prove
from .planted_predictions import plant_predictions, prove_prediction, threat_of
from .probing import (
    FROZEN,
    GOALS,
    ITERATES,
    KIND,
    PREDICTIONS,
    RANDOM,
    Probes,
    iterates,
    over,
    probe,
    some,
    stronger,
)
from .raising import MOST, to_raise

if TYPE_CHECKING:
    from .matrix import Matrix

Run = tuple[str, Callable[[Chunk], dict[str, Tensor]]]


class Auditor:
    """The audit of a matrix's cells.

    Args:
        matrix: whose cells are there.
        probes: names and settings.
    """

    def __init__(self, matrix: Matrix, probes: Probes) -> None:
        self.matrix, self.probes, self.experiment = matrix, probes, matrix.experiment
        self._fitted: dict[str, Attack] = {}

    def run(self) -> None:
        """Run what is missing, and again where attacks were given more steps; processes share it."""
        for _ in range(MOST):  # more often than steps can be raised
            self._run()
            found = [(row, column, to_raise(self.probes, row, column)) for row, column in self._done]
            self.matrix.session.accelerator.wait_for_everyone()
            more = [(row, column, steps) for row, column, steps in found if steps is not None]
            for row, column, steps in more:
                self.matrix.give_steps(row, column, steps)
            if not more:
                break

    def _run(self) -> None:
        runs, chunks = self._runs(), some(self.matrix.inputs, self.probes.settings.images)
        session = self.matrix.session
        with session.progress.task("audit of cells", len(runs)) as advance:
            for i, (name, make) in enumerate(runs):
                # Each is one file, the first of its name: processes take turns by the name instead.
                self.matrix.shards.make_one(KIND, name, chunks[0], partial(over, make, chunks), i)
                advance(1)
        session.accelerator.wait_for_everyone()

    @property
    def _done(self) -> list[tuple[Row, Column]]:
        cells = ((row, column) for row in self.experiment.rows for column in self.experiment.columns)
        return [cell for cell in cells if self.matrix.done(*cell)]

    def _runs(self) -> list[Run]:
        """What the audit runs, by name."""
        runs: list[Run] = []
        for label in dict.fromkeys(row.label for row, _ in self._done):
            of_row = self.experiment.row(label)
            kinds = [partial(self._answers, of_row), partial(self._weights, of_row)]
            runs += zip(self.probes.row_names(of_row), kinds, strict=False)
        for row, column in self._done:
            names = self.probes.names(row, column)
            runs += [(self.probes.cell(row, column, name), self._of(row, column, name)) for name in names]
        return runs

    def _of(self, row: Row, column: Column, name: str) -> Callable[[Chunk], dict[str, Tensor]]:
        """What is run for a cell under a name."""
        attack = self.probes.attack(row, column)
        assert attack is not None  # or there are no names
        now = column if attack is column.attack else _with(column, attack)
        kinds: dict[str, Callable[[Row, Column, Chunk], dict[str, Tensor]]] = {
            **{ITERATES: self._iterates, RANDOM: self._random, FROZEN: self._frozen},
            **{GOALS: self._goals, PREDICTIONS: self._predictions},
        }
        if name in kinds:
            return partial(kinds[name], row, now)
        return partial(self._again, row, _with(column, stronger(attack)[name]))

    def _answers(self, row: Row, chunk: Chunk) -> dict[str, Tensor]:
        return probe(self.matrix.prepared.by_row[row.label], chunk.x)

    def _weights(self, row: Row, chunk: Chunk) -> dict[str, Tensor]:
        system, distance = self.matrix.prepared.by_row[row.label], self._distance(row)
        return {"distance": torch.zeros(0)} if distance is None else other_weights(system, chunk.x, distance)

    def _iterates(self, row: Row, column: Column, chunk: Chunk) -> dict[str, Tensor]:
        """Whether the attack returns what it found."""
        job, matrix = self._job(row, column), self.matrix
        wanted = goal_map(column, job.system, chunk, matrix.pool(), self.experiment.seed)
        return iterates(job.attack, job.system, chunk, wanted)

    def _again(self, row: Row, column: Column, chunk: Chunk) -> dict[str, Tensor]:
        """What a stronger attack wins."""
        matrix = self.matrix
        made = matrix.crafter(matrix.adversaries.job(row, column), column, matrix.pool())(chunk)
        found = matrix.judging(row, column)(chunk, made)
        return {name: found[name] for name in ("sample", "success", "joint")}

    def _random(self, row: Row, column: Column, chunk: Chunk) -> dict[str, Tensor]:
        """What the best of many random changes does to the row."""
        system, draws = self.matrix.prepared.by_row[row.label], self.probes.settings.draws
        job = self._job(row, column)
        return best_random(job.attack, system, chunk, self._distance(row), draws)

    def _frozen(self, row: Row, column: Column, chunk: Chunk) -> dict[str, Tensor]:
        """Whether the attack succeeds where the draws of the system that it attacks are frozen."""
        job = self._job(row, column)
        return with_frozen_draws(job.attack, job.system, chunk)

    def _goals(self, row: Row, column: Column, chunk: Chunk) -> dict[str, Tensor]:
        """Whether the attack reaches planted maps, of the system that its adversary attacks."""
        job, distance = self._job(row, column), self._distance(row)
        reaching = job.attack.reaching()
        threat = None if reaching is None else reaching.plan(job.system).threat
        found, apart = torch.zeros(0), torch.zeros(0)
        if type(threat) is Linf and chunk.x.dim() == 4:
            planted = plant(job.system, chunk.x, threat.eps, self.experiment.seed, distance)
            root = getattr(getattr(job.attack, "known", None), "root", None)
            proof = prove(job.attack, job.system, planted, distance, root)
            assert proof is not None  # it can be given a goal map
            found, apart = proof.found.float().cpu(), proof.distance.float().cpu()
        return {"found": found, "distance": apart, "asked": torch.ones(len(chunk.x))}

    def _predictions(self, row: Row, column: Column, chunk: Chunk) -> dict[str, Tensor]:
        """Whether the attack finds planted predictions, on the classifier that its adversary attacks."""
        system = self._job(row, column).system
        threat = threat_of(column.attack, system) if chunk.x.dim() == 4 else None
        found, by_chance = torch.zeros(0), torch.zeros(0)
        if threat is not None:
            planted = plant_predictions(system, chunk.x, threat, self.experiment.seed)
            adapts = column.source is None and column.knowledge == "adaptive"
            attack = column.attack.adapted(planted.system) if adapts else column.attack
            found = prove_prediction(attack, planted, threat, chunk.goal_class is not None).float().cpu()
            by_chance = planted.random.float().cpu()
        return {"found": found, "random": by_chance, "asked": torch.ones(len(chunk.x))}

    def _job(self, row: Row, column: Column) -> Job:
        """The column's adversary, with an attack that was fitted where it must be."""
        job = self.matrix.adversaries.job(row, column)
        if not job.attack.needs_data:
            return job
        if job.name not in self._fitted:
            self._fitted[job.name] = job.attack.fitted(job.system, *self.matrix.fitting)
        return replace(job, attack=self._fitted[job.name])

    def _distance(self, row: Row) -> MapMetric | None:
        """By which maps of the row are judged."""
        return self.matrix.rule(row).distance


def _with(column: Column, attack: Attack) -> Column:
    """The column with another attack, under a name of its own."""
    return replace(column, label=f"{column.label} {attack!r}", attack=attack)
