"""The iterative search that most attacks use.

An attack is a sequence of stages on one variable. Directions may come from a *surrogate* of the system. The best
iterate and all reported figures come from the real system.
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
from robustexplain.objectives import Goal, Objective, Observation, needs_of
from robustexplain.objectives.base import at
from robustexplain.random_streams import Streams
from robustexplain.registry import OBJECTIVES
from robustexplain.system import System

from ..threat import L2, Linf, Threat
from .best import BestIterates, Rows, SearchRecord
from .directions import Direction, DirectionResult, GradientDirection, StepContext
from .updates import Memory, MomentumStep, NormalisedStep, SignStep, Update


@dataclass(frozen=True)
class Stage:
    """One objective, minimised for a number of steps."""

    objective: Objective
    steps: Natural
    update: Update

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def length(self) -> float | None:
        """Of all its steps together; ``None`` where a step has no length of its own."""
        if not isinstance(self.update, (SignStep, NormalisedStep, MomentumStep)):
            return None
        return sum(at(self.update.size, i / max(self.steps - 1, 1)) for i in range(self.steps))


@dataclass(frozen=True)
class SearchResult:
    """What a search returns, one entry per sample.

    Args:
        x: the attacked inputs ``[B, ...]``.
        queries: int64 ``[B]``, number of inputs evaluated by the system.
        zero_direction: bool ``[B]``, where the first direction was exactly zero
            (:attr:`~.directions.Direction.zero_means`).
        stalled: bool ``[B]``, where the objective never fell below its value at the start (and was not met there).
        surrogate_misled: bool ``[B]``, where it stalled on the real system although it fell on the surrogate.
    """

    x: Tensor
    queries: Tensor
    zero_direction: Tensor
    stalled: Tensor
    surrogate_misled: Tensor

    @classmethod
    def of(cls, x: Tensor, queries: int | Tensor = 0, stalled: Tensor | None = None) -> SearchResult:
        """The result of a search that reports no zero directions and uses no surrogate."""
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        counts = torch.zeros(len(x), dtype=torch.int64, device=x.device) + queries
        stalled = none if stalled is None else stalled
        return cls(x=x, queries=counts, zero_direction=none, stalled=stalled, surrogate_misled=none)

    @classmethod
    def judged(cls, best: BestIterates, record: SearchRecord) -> SearchResult:
        """The best iterates, with the figures of the record."""
        stalled, misled = record.verdict(best)
        return cls(
            x=best.x,
            queries=record.queries,
            zero_direction=record.zero_direction,
            stalled=stalled,
            surrogate_misled=misled,
        )


class Plan(ABC):
    """An attack ready to run: threat model, objective and search."""

    threat: Threat

    @property
    @abstractmethod
    def aim(self) -> Objective:
        """The objective that decides which iterate is best."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """The search in a few words, for tables."""

    @abstractmethod
    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Search for the attacked inputs; samples do not influence each other."""

    def summaries(self) -> tuple[str, str, str]:
        """Threat model, objective and search, in a few words for tables."""
        return self.threat.summary, objective_summary(self.aim), self.summary


def objective_summary(objective: Objective) -> str:
    """The registered names of an objective's parts, joined by ``+``."""
    names = {entry.build: entry.name for entry in OBJECTIVES}
    # An objective that only rescales another one (its field ``of``) goes by the name of that one.
    parts = [getattr(part, "of", part) for _, part in objective.terms()]
    return " + ".join(names.get(type(part), type(part).__name__) for part in parts)


@dataclass
class ActiveSamples:
    """The samples that the search has not finished; ``rows`` are their indices in the batch."""

    rows: Rows
    variable: Tensor
    goal: Goal
    streams: Streams
    threat: Threat
    memory: Memory = ()
    tick: int = 0
    """Steps taken so far, in all stages and restarts."""
    uncounted_queries: int = 0
    """Queries for each of them that are not in the search's record yet."""
    lowest: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    """``[rows]``: the lowest loss of the last stage; empty in a search without ``patience``."""
    lowest_before: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    """``[rows]``: ``lowest`` at the last plateau check; empty in a search without ``patience``."""

    def context(self, system: System, objective: Objective, progress: float) -> StepContext:
        """The input of a direction at this step."""
        return StepContext(system, self.threat, self.goal, objective, self.streams, progress, self.tick)

    def count_queries(self, record: SearchRecord) -> None:
        """Add the queries since the last call to the record, for every active sample."""
        record.queries[self.rows] += self.uncounted_queries
        self.uncounted_queries = 0

    def keep(self, mask: Tensor) -> None:
        """Continue with only the samples where ``mask`` is true."""
        left = mask.nonzero()[:, 0]
        self.rows = left if isinstance(self.rows, slice) else self.rows[left]
        self.variable = self.variable[left]
        self.goal, self.streams = self.goal.select(left), self.streams.select(left)
        self.threat, self.memory = self.threat.select(left), tuple(m[left] for m in self.memory)
        if len(self.lowest):
            self.lowest, self.lowest_before = self.lowest[left], self.lowest_before[left]


@dataclass(frozen=True)
class Search(Plan):
    """Iterative search: stages of steps along a direction, with projection onto the threat model.

    Args:
        threat: the set of allowed variables.
        stages: objectives and their steps, in order; the objective of the last stage decides which iterate is best.
        direction: gives the direction of each step: the gradient of the system or of a surrogate, an average over
            random draws, or an estimate.
        evaluate_every: if directions come from a surrogate, the real system is evaluated every so many steps.
        random_start: begin at a random allowed input instead of at ``x``.
        restarts: number of runs, of which the best counts; every run but the first begins at random.
        early_stop: stop a sample as soon as it meets every constraint (for objectives that consist of constraints).
        patience: stop a sample if a tenth of the last stage's steps lowered its lowest loss by less than this share of
            it; 0 turns this off.
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
    def reach(self) -> float | None:
        """How far its steps can lead from the input, in the norm of the threat model's radius.

        ``None`` where it begins at random, or where a step has no length of its own (Adam's, one along a flow).
        """
        lengths = [stage.length for stage in self.stages]
        ball = isinstance(self.threat, (Linf, L2))
        known = ball and not self.random_start and self.restarts == 1 and None not in lengths
        return sum(length for length in lengths if length is not None) if known else None

    @property
    def aim(self) -> Objective:
        """The last stage's objective."""
        return self.stages[-1].objective

    @property
    def summary(self) -> str:
        """The update, its direction, and the objective of a warm start."""
        update = type(self.stages[-1].update).__name__
        warm = f"after {objective_summary(self.stages[0].objective)}" if len(self.stages) > 1 else ""
        return ", ".join(part for part in (update, self.direction.summary, warm) if part)

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Search from ``goal.x``; samples do not influence each other.

        Raises:
            NotDifferentiableError: the direction is a gradient, and the maps or logits have none.
        """
        with unchecked(), torch.set_grad_enabled(self.direction.needs_graph):
            found = self._run(system, goal, streams)
        if bool(found.zero_direction.any()):
            count = f"{int(found.zero_direction.sum())} of {len(found.zero_direction)} samples"
            reason, category = self.direction.zero_reason(self.aim)
            message = f"the attack moves nowhere for {count}, which looks like robustness: {reason}"
            warnings.warn(message, category, stacklevel=4)
        return found

    def _run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        best, record = BestIterates.none(goal.x), SearchRecord.none(goal.x)
        for attempt in range(self.restarts):
            # A sample that meets every constraint is finished only in an attack that stops early.
            unfinished = best.unmet > 0 if self.early_stop else torch.ones_like(best.gained)
            rows = unfinished.nonzero()[:, 0]
            if not len(rows):
                break
            live = self._begin(goal, streams, rows, at_random=self.random_start or attempt > 0)
            # Restarts see other draws of a random system.
            live.tick = attempt * sum(stage.steps for stage in self.stages)
            for stage in self.stages:
                self._stage(system, stage, live, record, best if stage is self.stages[-1] else None)
        return SearchResult.judged(best, record)

    def _begin(self, goal: Goal, streams: Streams, rows: Tensor, *, at_random: bool) -> ActiveSamples:
        everyone = len(rows) == len(goal.x)
        goal, streams = goal.select(rows), streams.select(rows)
        threat = self.threat.bind(goal.x, streams)
        start = threat.begun(goal.x, streams if at_random else None)
        return ActiveSamples(slice(None) if everyone else rows, start, goal, streams, threat)

    def _stage(
        self, system: System, stage: Stage, live: ActiveSamples, record: SearchRecord, best: BestIterates | None
    ) -> None:
        """All steps of a stage; the last stage gets ``best`` and evaluates its iterates."""
        live.memory = stage.update.begin(live.variable)
        for step in range(stage.steps):
            context = live.context(system, stage.objective, step / max(stage.steps - 1, 1))
            found = self.direction(context, live.variable, step == 0)
            live.uncounted_queries += found.queries
            # A warm start on the prediction without a direction is no failure: the stage after it may have one.
            if step == 0 and (best is not None or "maps" in needs_of(stage.objective)):
                record.zero_direction[live.rows] |= found.zero_direction
            gradient = found.gradient
            if best is not None:
                stays = self._evaluate_step(context, live, found, record, best, step, stage.steps)
                gradient = gradient if stays is None else gradient[stays]
            if not len(live.variable):
                return
            moved, live.memory = stage.update(live.variable, gradient, context.progress, live.memory)
            live.variable = live.threat.held(live.goal.x, moved).detach()
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
        """Evaluate the iterate and drop finished samples; ``[rows]`` bool, which stay; ``None`` if all do."""
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
        """Where a tenth of the steps lowered the lowest loss by less than ``patience``, ``[rows]`` bool."""
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
        """Update the best iterates on the real system; where all constraints are met, ``[rows]`` bool."""
        if seen is None:
            with torch.no_grad():
                seen = context.observe(live.variable)
            live.uncounted_queries += 1
        return best.update(live.rows, seen, live.goal, context.objective, always=last)
