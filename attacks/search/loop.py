"""How an attack looks for its input: one loop for all of them.

An attack is a sequence of stages on one variable. Directions may come from a *surrogate* of the system; which iterate
is best, and every figure, comes from the real one.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from robustexplain.fields import Count, Fraction, Natural, check_fields
from robustexplain.interpreters import unchecked
from robustexplain.objectives import Goal, Objective, Observation
from robustexplain.random_streams import Streams
from robustexplain.registry import OBJECTIVES
from robustexplain.system import System

from ..threat import Threat
from .best import BestIterates, Rows, SearchRecord
from .directions import Direction, DirectionResult, GradientDirection, StepContext
from .updates import Memory, Update


@dataclass(frozen=True)
class Stage:
    """One objective, followed for some steps."""

    objective: Objective
    steps: Natural
    update: Update

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class SearchResult:
    """What a search returns, one entry a sample.

    Args:
        x: the attacked inputs ``[B, ...]``.
        queries: int64 ``[B]``, how many inputs were shown to the system.
        zero_direction: bool, where there was no direction to go in (:attr:`~.directions.Direction.zero_means`).
        stalled: bool, where the objective never fell below its value at the start (and was not met there).
        surrogate_misled: bool, where it stalled although the stand-in that was followed saw it fall.
    """

    x: Tensor
    queries: Tensor
    zero_direction: Tensor
    stalled: Tensor
    surrogate_misled: Tensor

    @classmethod
    def of(cls, x: Tensor, queries: int | Tensor = 0, stalled: Tensor | None = None) -> SearchResult:
        """For a search that has less to report."""
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        counts = torch.zeros(len(x), dtype=torch.int64, device=x.device) + queries
        stalled = none if stalled is None else stalled
        return cls(x=x, queries=counts, zero_direction=none, stalled=stalled, surrogate_misled=none)

    @classmethod
    def judged(cls, best: BestIterates, record: SearchRecord) -> SearchResult:
        """The best iterates, and what the search says of itself."""
        stalled, misled = record.verdict(best)
        return cls(
            x=best.x,
            queries=record.queries,
            zero_direction=record.zero_direction,
            stalled=stalled,
            surrogate_misled=misled,
        )


class Plan(ABC):
    """A threat model, an objective and a way to look: what an attack consists of, ready to run."""

    threat: Threat

    @property
    @abstractmethod
    def aim(self) -> Objective:
        """The objective that decides which iterate is best."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """How it looks, in a few words for tables."""

    @abstractmethod
    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Look for the attacked inputs; every sample on its own."""

    def summaries(self) -> tuple[str, str, str]:
        """Threat model, objective and search, in a few words for tables."""
        return self.threat.summary, objective_summary(self.aim), self.summary


def objective_summary(objective: Objective) -> str:
    """The registered names of an objective's parts, joined by ``+``."""
    names = {entry.build: entry.name for entry in OBJECTIVES}
    # What only changes another objective's scale is not a wish of its own.
    parts = [getattr(part, "of", part) for _, part in objective.terms()]
    return " + ".join(names.get(type(part), type(part).__name__) for part in parts)


@dataclass
class ActiveSamples:
    """The samples that are still searched for; ``rows`` says which of the batch they are."""

    rows: Rows
    variable: Tensor
    goal: Goal
    streams: Streams
    threat: Threat
    memory: Memory = ()
    tick: int = 0
    """Steps taken so far, in all stages."""
    shown: int = 0
    """Inputs shown to the system for each of them, and not yet counted by the search."""
    lowest: Tensor = field(default_factory=lambda: torch.empty(0))
    """``[rows]``: the lowest loss of the last stage, and ...; empty where nobody asks whether it falls."""
    lowest_before: Tensor = field(default_factory=lambda: torch.empty(0))
    """... what that was when it was last asked."""

    def context(self, system: System, objective: Objective, progress: float) -> StepContext:
        """What a direction is asked for at this step."""
        return StepContext(system, self.threat, self.goal, objective, self.streams, progress, self.tick)

    def count_queries(self, record: SearchRecord) -> None:
        """Count the inputs shown since the last call for every active sample."""
        record.queries[self.rows] += self.shown
        self.shown = 0

    def keep(self, mask: Tensor) -> None:
        """Go on with the samples at which ``mask`` is true alone."""
        left = mask.nonzero()[:, 0]
        self.rows = left if isinstance(self.rows, slice) else self.rows[left]
        self.variable = self.variable[left]
        self.goal, self.streams = self.goal.select(left), self.streams.select(left)
        self.threat, self.memory = self.threat.select(left), tuple(m[left] for m in self.memory)
        if len(self.lowest):
            self.lowest, self.lowest_before = self.lowest[left], self.lowest_before[left]


@dataclass(frozen=True)
class Search(Plan):
    """The loop: threat model, stages, directions, and how iterates are judged.

    Args:
        threat: where the variable may go.
        stages: objectives and their steps, in order; the last one decides which iterate is best.
        direction: where steps lead: the gradient of the system, of a stand-in, of an average, or an estimate.
        evaluate_every: if directions do not come from the real system, look at it every so many steps.
        random_start: begin at a random allowed input instead of at ``x``.
        restarts: run this often and keep the best; every run but the first begins at random.
        early_stop: let a sample go as soon as it meets every constraint (for objectives made of constraints alone).
        patience: let a sample go if a tenth of the last stage's steps lowered its lowest loss by less than this share;
            0 never does.
        returns: the ``best`` iterate, or the ``last`` as some attacks are published.
    """

    threat: Threat
    stages: tuple[Stage, ...]
    direction: Direction = field(default_factory=GradientDirection)
    evaluate_every: Count = 10
    random_start: bool = False
    restarts: Count = 1
    early_stop: bool = False
    patience: Fraction = 0.0
    returns: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def aim(self) -> Objective:
        """The last stage's objective."""
        return self.stages[-1].objective

    @property
    def summary(self) -> str:
        """The update, what its direction comes from, and the warm start."""
        said = self.direction.summary
        update = type(self.stages[-1].update).__name__
        warm = f"after {objective_summary(self.stages[0].objective)}" if len(self.stages) > 1 else ""
        return ", ".join(part for part in (update, said, warm) if part)

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Search from ``goal.x``; every sample on its own.

        Raises:
            NotDifferentiableError: if the direction is a gradient, and the maps or logits carry none.
        """
        with unchecked(), torch.set_grad_enabled(self.direction.needs_graph):
            found = self._run(system, goal, streams)
        if bool(found.zero_direction.any()):
            count = f"{int(found.zero_direction.sum())} of {len(found.zero_direction)} samples"
            said = f"the attack moves nowhere for {count}, which looks like robustness: {self.direction.zero_means}"
            warnings.warn(said, self.direction.zero_warning, stacklevel=4)
        return found

    def _run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        best, record = BestIterates.none(goal.x), SearchRecord.none(goal.x)
        for attempt in range(self.restarts):
            # Only an attack that stops early is done with a sample that meets every constraint.
            unfinished = best.unmet > 0 if self.early_stop else torch.ones_like(best.gained)
            rows = unfinished.nonzero()[:, 0]
            if not len(rows):
                break
            live = self._begin(goal, streams, rows, at_random=self.random_start or attempt > 0)
            for stage in self.stages:
                self._stage(system, stage, live, record, best if stage is self.stages[-1] else None)
        return SearchResult.judged(best, record)

    def _begin(self, goal: Goal, streams: Streams, rows: Tensor, *, at_random: bool) -> ActiveSamples:
        everyone = len(rows) == len(goal.x)
        goal, streams = goal.select(rows), streams.select(rows)
        threat = self.threat.bind(goal.x, streams)
        start = threat.start(goal.x, streams if at_random else None)
        return ActiveSamples(slice(None) if everyone else rows, start, goal, streams, threat)

    def _stage(
        self, system: System, stage: Stage, live: ActiveSamples, record: SearchRecord, best: BestIterates | None
    ) -> None:
        """Steps along directions; in the last stage, whose ``best`` are kept, each of them is evaluated."""
        live.memory = stage.update.begin(live.variable)
        for step in range(stage.steps):
            context = live.context(system, stage.objective, step / max(stage.steps - 1, 1))
            found = self.direction(context, live.variable, step == 0)
            live.shown += found.queries
            if step == 0:
                record.zero_direction[live.rows] |= found.zero_direction
            gradient = found.gradient
            if best is not None:
                stays = self._evaluate_step(context, live, found, record, best, step, stage.steps)
                gradient = gradient if stays is None else gradient[stays]
            if not len(live.variable):
                return
            moved, live.memory = stage.update(live.variable, gradient, context.progress, live.memory)
            live.variable = live.threat.project(live.goal.x, moved).detach()
            live.tick += 1
        if best is not None:
            context = live.context(system, stage.objective, 1.0)
            self._evaluate(context, live, None, best, last=self.returns == "last")
        live.count_queries(record)

    def _evaluate_step(
        self,
        context: StepContext,
        live: ActiveSamples,
        found: DirectionResult,
        record: SearchRecord,
        best: BestIterates,
        step: int,
        steps: int,
    ) -> Tensor | None:
        """Evaluate the iterate and let samples go that are done; which stay, ``[rows]`` bool, where some do not."""
        on_real_system = found.seen is not None
        if not on_real_system:
            record.follow(live.rows, found.loss, first=step == 0)
        done = [self._on_plateau(live, found.loss, step, steps)] if self.patience else []
        if on_real_system or step % self.evaluate_every == 0:
            met = self._evaluate(context, live, found.seen, best, last=False)
            done += [met] if self.early_stop else []
        if not done or not bool((leave := torch.stack(done).any(0)).any()):
            return None
        live.count_queries(record)
        live.keep(~leave)
        return ~leave

    def _on_plateau(self, live: ActiveSamples, loss: Tensor, step: int, steps: int) -> Tensor:
        """Where the lowest loss so far hardly fell in a tenth of the steps, ``[rows]`` bool."""
        none = torch.zeros_like(loss, dtype=torch.bool)
        live.lowest = torch.minimum(live.lowest, loss) if step else loss
        if step % -(-steps // 10):
            return none
        plateau = live.lowest > live.lowest_before - self.patience * live.lowest_before.abs() if step else none
        live.lowest_before = live.lowest
        return plateau

    def _evaluate(
        self, context: StepContext, live: ActiveSamples, seen: Observation | None, best: BestIterates, *, last: bool
    ) -> Tensor:
        """Take over what is better, seen on the real system; where all constraints are met, ``[rows]`` bool."""
        if seen is None:
            with torch.no_grad():
                seen = context.observe(live.variable)
            live.shown += 1
        return best.update(live.rows, seen, live.goal, context.objective, always=last)
