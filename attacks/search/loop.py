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

from robustexplain.errors import ZeroMapGradientWarning
from robustexplain.fields import Count, Fraction, Natural, check_fields
from robustexplain.interpreters import unchecked
from robustexplain.objectives import Goal, Objective, Observation
from robustexplain.random_streams import Streams
from robustexplain.registry import OBJECTIVES
from robustexplain.system import System

from ..threat import Threat
from .best import BestIterates, Rows, SearchRecord
from .directions import Direction, GradientDirection, StepContext
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
        no_map_gradient: bool, where the map's gradient was exactly zero.
        stalled: bool, where the objective never fell below its value at the start (and was not met there).
        surrogate_misled: bool, where it stalled although the stand-in that was followed saw it fall.
    """

    x: Tensor
    queries: Tensor
    no_map_gradient: Tensor
    stalled: Tensor
    surrogate_misled: Tensor

    @classmethod
    def of(cls, x: Tensor, queries: int | Tensor = 0, stalled: Tensor | None = None) -> SearchResult:
        """For a search that has less to report."""
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        counts = torch.zeros(len(x), dtype=torch.int64, device=x.device) + queries
        return cls(x, counts, none, none if stalled is None else stalled, none)


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
    shown: int = 0
    """Inputs shown to the system for each of them, and not yet counted by the search."""
    low: Tensor = field(default_factory=lambda: torch.empty(0))
    """``[rows]``: the lowest loss of the last stage, and ...; empty where nobody asks whether it falls."""
    mark: Tensor = field(default_factory=lambda: torch.empty(0))
    """... what that was when it was last asked."""

    def problem(self, system: System, objective: Objective, progress: float) -> StepContext:
        """What a direction is asked for at this step."""
        return StepContext(system, self.threat, self.goal, objective, self.streams, progress, self.tick)

    def settle(self, seen: SearchRecord) -> None:
        """Count the inputs shown since the last call for every active sample."""
        seen.queries[self.rows] += self.shown
        self.shown = 0

    def keep(self, mask: Tensor) -> None:
        """Go on with the samples at which ``mask`` is true alone."""
        left = mask.nonzero()[:, 0]
        self.rows = left if isinstance(self.rows, slice) else self.rows[left]
        self.variable = self.variable[left]
        self.goal, self.streams = self.goal.select(left), self.streams.select(left)
        self.threat, self.memory = self.threat.select(left), tuple(m[left] for m in self.memory)
        if len(self.low):
            self.low, self.mark = self.low[left], self.mark[left]


@dataclass(frozen=True)
class Search(Plan):
    """The loop: threat model, stages, directions, and how iterates are judged.

    Args:
        threat: where the variable may go.
        stages: objectives and their steps, in order; the last one decides which iterate is best.
        direction: where steps lead: the gradient of the system, of a stand-in, of an average, or an estimate.
        judge_every: if directions do not come from the real system, look at it every so many steps (else it is free).
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
    judge_every: Count = 10
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
        dead = found.no_map_gradient
        if bool(dead.any()):
            warnings.warn(_no_gradient(int(dead.sum()), len(dead)), ZeroMapGradientWarning, stacklevel=4)
        return found

    def _run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        best, seen = BestIterates.none(goal.x), SearchRecord.none(goal.x)
        for attempt in range(self.restarts):
            wanted = best.unmet > (0 if self.early_stop else -1)
            rows = wanted.nonzero()[:, 0]
            if not len(rows):
                break
            own = streams.select(rows)
            mine = goal.select(rows)
            threat = self.threat.bind(mine.x, own)
            start = threat.start(mine.x, own if self.random_start or attempt else None)
            live = ActiveSamples(rows if len(rows) < len(wanted) else slice(None), start, mine, own, threat)
            for stage in self.stages:
                self._stage(system, stage, live, best if stage is self.stages[-1] else None, seen)
        return SearchResult(best.x, seen.queries, seen.flat, *seen.verdict(best))

    def _stage(
        self, system: System, stage: Stage, live: ActiveSamples, best: BestIterates | None, seen: SearchRecord
    ) -> None:
        live.memory = stage.update.begin(live.variable)
        for step in range(stage.steps):
            problem = live.problem(system, stage.objective, step / max(stage.steps - 1, 1))
            found = self.direction(problem, live.variable, step == 0)
            live.shown += found.queries
            if step == 0:
                seen.flat[live.rows] |= found.no_map_gradient
            gradient = found.gradient
            if best is not None:
                if found.seen is None:
                    seen.follow(live.rows, found.loss, first=step == 0)
                done = [self._stuck(live, found.loss, step, stage.steps)] if self.patience else []
                if found.seen is not None or step % self.judge_every == 0:
                    met = self._judge(problem, live, found.seen, best, last=False)
                    done += [met] if self.early_stop else []
                if done and bool((leave := torch.stack(done).any(0)).any()):
                    live.settle(seen)
                    live.keep(~leave)
                    gradient = gradient[~leave]
            if not len(live.variable):
                return
            moved, live.memory = stage.update(live.variable, gradient, problem.progress, live.memory)
            live.variable = live.threat.project(live.goal.x, moved).detach()
            live.tick += 1
        if best is not None:
            problem = live.problem(system, stage.objective, 1.0)
            self._judge(problem, live, None, best, last=self.returns == "last")
        live.settle(seen)

    def _stuck(self, live: ActiveSamples, loss: Tensor, step: int, steps: int) -> Tensor:
        """Where the lowest loss so far hardly fell in a tenth of the steps, ``[rows]`` bool."""
        none = torch.zeros_like(loss, dtype=torch.bool)
        live.low = torch.minimum(live.low, loss) if step else loss
        if step % -(-steps // 10):
            return none
        stuck = live.low > live.mark - self.patience * live.mark.abs() if step else none
        live.mark = live.low
        return stuck

    def _judge(
        self, problem: StepContext, live: ActiveSamples, look: Observation | None, best: BestIterates, *, last: bool
    ) -> Tensor:
        """Take over what is better, seen on the real system; where all constraints are met, ``[rows]`` bool."""
        if look is None:
            with torch.no_grad():
                look = problem.observe(live.variable)
            live.shown += 1
        return best.update(live.rows, look, live.goal, problem.objective, always=last)


def _no_gradient(count: int, total: int) -> str:
    return (
        f"the map's gradient is exactly zero for {count} of {total} samples, so their attack moves nowhere: "
        "this looks like robustness and is not. A network of rectifiers has no second derivative: give the attack a "
        "surrogate (SmoothGradient, Softplus), or attack an interpreter that is not itself a gradient. A map that its "
        "own ReLU cut to zero has no gradient either"
    )
