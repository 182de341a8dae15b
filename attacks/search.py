"""How an attack looks for its input: one loop for all of them.

An attack is a sequence of stages on one variable. Directions may come from a *surrogate* of the system; which iterate
is best, and every figure, comes from the real one.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.activations import Smooth, swapped
from robustexplain.errors import InputError, NotDifferentiableError, ZeroMapGradientWarning
from robustexplain.fields import Count, Natural, check_fields
from robustexplain.interpreters import unwatched
from robustexplain.objectives import Goal, Objective, Seen, Weight, at, needs_of, sum_losses
from robustexplain.streams import Streams
from robustexplain.system import System

from .threat import Threat


class Update(ABC):
    """One step of a search along a gradient."""

    @abstractmethod
    def __call__(self, variable: Tensor, gradient: Tensor, progress: float) -> Tensor:
        """The variable after the step, before projection."""


@dataclass(frozen=True)
class SignStep(Update):
    """``v - size * sign(g)`` (Madry et al. 2018; Zhang et al. 2020, eq. 4)."""

    size: Weight = 1 / 255

    def __call__(self, variable: Tensor, gradient: Tensor, progress: float) -> Tensor:
        """One sign step."""
        return variable - at(self.size, progress) * gradient.sign()


@dataclass(frozen=True)
class NormalisedStep(Update):
    """``v - size * g / ||g||_2`` per sample: the step of the L2 ball."""

    size: Weight = 0.1

    def __call__(self, variable: Tensor, gradient: Tensor, progress: float) -> Tensor:
        """One step of length ``size``."""
        norm = ops.expand(gradient.flatten(1).norm(dim=1), gradient)
        return variable - at(self.size, progress) * gradient / norm.clamp(min=1e-12)


@dataclass(frozen=True)
class Stage:
    """One objective, followed for some steps."""

    objective: Objective
    steps: Natural
    update: Update

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Found:
    """What a search returns: the best inputs, and whether the map gradient was zero (``[B]`` bool)."""

    x: Tensor
    no_map_gradient: Tensor


def observe(system: System, x: Tensor, goal: Goal, needs: frozenset[str]) -> Seen:
    """One look at the system: logits always, maps (of the goal class, on their own grid) and score if needed."""
    score = None
    if "score" in needs:
        if system.detector is None:
            raise InputError("this objective needs a system with a detector, and the system has none")
        score = system.detector.soft_score(x)
    if "maps" not in needs:
        return Seen(x, system.model(x), score=score)
    found = system.interpreter.explain(x, goal.goal_class, native=True)
    return Seen(x, *found, score=score)


@dataclass
class _Best:
    """Per sample, the best iterate so far: nearest to meeting every constraint, then the lowest score."""

    x: Tensor
    unmet: Tensor
    score: Tensor

    @classmethod
    def none(cls, x: Tensor) -> _Best:
        far = torch.full((len(x),), torch.inf, device=x.device)
        return cls(x.clone(), far.clone(), far)

    def update(self, rows: Tensor, seen: Seen, goal: Goal, objective: Objective) -> Tensor:
        """Take over what is better; where all constraints are met, ``[len(rows)]`` bool."""
        unmet, score = _rank(objective, seen, goal)
        better = (unmet < self.unmet[rows]) | ((unmet == self.unmet[rows]) & (score < self.score[rows]))
        at_rows = rows[better]
        self.x[at_rows] = seen.x.detach()[better]
        self.unmet[at_rows], self.score[at_rows] = unmet[better], score[better]
        return unmet == 0


def _rank(objective: Objective, seen: Seen, goal: Goal) -> tuple[Tensor, Tensor]:
    """Unmet constraints and the loss that decides among equals (weights as they are at the end of the search)."""
    with torch.no_grad():
        terms = objective.terms()
        constraints = [part for _, part in terms if part.constraint]
        unmet = sum((part.unmet(seen, goal) for part in constraints), torch.zeros(len(seen.x), device=seen.x.device))
        rest = tuple(t for t in terms if not t[1].constraint) or terms
        return unmet, sum_losses(rest, seen.at(1.0), goal).float()


@dataclass(frozen=True)
class Search:
    """The loop: threat model, stages, and how iterates are judged.

    Args:
        threat: where the variable may go.
        stages: objectives and their steps, in order; the last one decides which iterate is best.
        surrogate: what rectifiers compute while directions are sought; ``None`` follows the system itself.
        judge_every: with a surrogate, look at the real system every so many steps (without one it costs nothing).
        random_start: begin at a random allowed input instead of at ``x``.
        restarts: run this often and keep the best; every run but the first begins at random.
        early_stop: let a sample go as soon as it meets every constraint (for objectives made of constraints alone).
    """

    threat: Threat
    stages: tuple[Stage, ...]
    surrogate: Smooth | None = None
    judge_every: Count = 10
    random_start: bool = False
    restarts: Count = 1
    early_stop: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, system: System, goal: Goal, streams: Streams) -> Found:
        """Search from ``goal.x``; every sample on its own.

        Raises:
            NotDifferentiableError: if the maps carry no gradient.
        """
        with unwatched():
            found = self._run(system, goal, streams)
        dead = found.no_map_gradient
        if bool(dead.any()):
            warnings.warn(_no_gradient(int(dead.sum()), len(dead)), ZeroMapGradientWarning, stacklevel=4)
        return found

    def _run(self, system: System, goal: Goal, streams: Streams) -> Found:
        best = _Best.none(goal.x)
        dead = torch.zeros(len(goal.x), dtype=torch.bool, device=goal.x.device)
        for attempt in range(self.restarts):
            random = streams if self.random_start or attempt else None
            variable = self.threat.start(goal.x, random)
            rows = torch.arange(len(goal.x), device=goal.x.device)
            for stage in self.stages:
                last = stage is self.stages[-1]
                variable, rows = self._stage(system, goal, streams, stage, variable, rows, best if last else None, dead)
        return Found(best.x, dead)

    def _stage(
        self,
        system: System,
        goal: Goal,
        streams: Streams,
        stage: Stage,
        variable: Tensor,
        rows: Tensor,
        best: _Best | None,
        dead: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs = needs_of(stage.objective)
        now_goal, now_streams = goal.select(rows), streams.select(rows)
        for step in range(stage.steps):
            progress = step / max(stage.steps - 1, 1)
            variable.requires_grad_()
            # The prediction alone needs no stand-in: it has its gradient.
            with swapped(self.surrogate) if self.surrogate is not None and needs else nullcontext():
                seen = observe(system, self.threat.apply(now_goal.x, variable), now_goal, needs)
                gradient, stuck = _direction(
                    stage.objective, seen, now_goal, variable, progress, now_streams, step == 0
                )
            dead[rows] |= stuck
            variable = variable.detach()
            if best is not None and (self.surrogate is None or step % self.judge_every == 0):
                real = seen if self.surrogate is None else self._look(system, variable, now_goal, needs)
                done = best.update(rows, real, now_goal, stage.objective)
                if self.early_stop and bool(done.any()):
                    keep = ~done
                    rows, variable, gradient = rows[keep], variable[keep], gradient[keep]
                    now_goal, now_streams = now_goal.select(keep), now_streams.select(keep.nonzero()[:, 0])
                    if len(rows) == 0:
                        return variable, rows
            variable = self.threat.project(now_goal.x, stage.update(variable, gradient, progress))
        if best is not None:
            best.update(rows, self._look(system, variable, now_goal, needs), now_goal, stage.objective)
        return variable, rows

    def _look(self, system: System, variable: Tensor, goal: Goal, needs: frozenset[str]) -> Seen:
        with torch.no_grad():
            return observe(system, self.threat.apply(goal.x, variable), goal, needs)


def _direction(
    objective: Objective, seen: Seen, goal: Goal, variable: Tensor, progress: float, streams: Streams, check: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the loss, and (on the first step of a stage) where that of its map part is zero."""
    seen = replace(seen, progress=progress, streams=streams)
    stuck = torch.zeros(len(seen.x), dtype=torch.bool, device=seen.x.device)
    about_maps = tuple((w, part) for w, part in objective.terms() if "maps" in part.needs and not part.constraint)
    if check and about_maps:
        loss = sum_losses(about_maps, seen, goal)
        alone = _grad_or_none(loss.sum(), variable)
        if alone is None:
            raise NotDifferentiableError("the maps carry no gradient to the input: their graph is detached")
        broken = ~torch.isfinite(alone).flatten(1).all(1)
        if bool(broken.any()):
            first = int(broken.nonzero()[0])
            raise InputError(
                f"the map of sample {first} of {len(alone)}, or its gradient, is NaN or infinite: no direction can "
                "come of it; does the model overflow on this input, or in this precision?"
            )
        stuck = (alone.flatten(1).abs().amax(1) == 0) & (loss.detach() > 0)
    (gradient,) = torch.autograd.grad(objective.loss(seen, goal).sum(), variable)
    return gradient, stuck


def _grad_or_none(loss: Tensor, variable: Tensor) -> Tensor | None:
    """The gradient; ``None`` if the graph does not lead to the variable (to the weights it may)."""
    if not loss.requires_grad:
        return None
    return torch.autograd.grad(loss, variable, retain_graph=True, allow_unused=True)[0]


def _no_gradient(count: int, total: int) -> str:
    return (
        f"the map's gradient is exactly zero for {count} of {total} samples, so their attack moves nowhere: "
        "this looks like robustness and is not. A network of rectifiers has no second derivative: give the attack a "
        "surrogate (SmoothGradient, Softplus), or attack an interpreter that is not itself a gradient. A map that its "
        "own ReLU cut to zero has no gradient either"
    )
