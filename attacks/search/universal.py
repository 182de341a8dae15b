"""One variable for all inputs: fitted on images of the adversary's own, then put on any input as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustexplain import checks
from robustexplain.errors import InputError, ZeroMapGradientWarning
from robustexplain.fields import Count, check_fields
from robustexplain.interpreters import unchecked
from robustexplain.objectives import Goal, Objective
from robustexplain.random_streams import Streams, generator
from robustexplain.system import System

from ..base import Attack
from ..threat import Threat
from .best import rank
from .directions import Direction, GradientDirection, StepContext
from .loop import Plan, SearchResult
from .updates import Update


@dataclass(frozen=True)
class UniversalSearch(Plan):
    """One variable for all images: each step moves it along the mean gradient of a mini-batch.

    What is random in the threat model (where a patch lies) is drawn anew for every image and step, so the variable
    works on average over it (expectation over transformation, Athalye et al. 2018b).

    Args:
        threat: where the variable may go.
        objective: what it should do, on average over the images.
        steps: mini-batches.
        update: how a gradient moves the variable.
        batch_size: images a step; their order is drawn anew once all have been seen.
        direction: where gradients come from.
    """

    threat: Threat
    objective: Objective
    steps: Count
    update: Update
    batch_size: Count = 32
    direction: Direction = field(default_factory=GradientDirection)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def aim(self) -> Objective:
        """The objective."""
        return self.objective

    @property
    def summary(self) -> str:
        """The update, and what its direction comes from."""
        said = (type(self.update).__name__, self.direction.summary, "on mini-batches")
        return ", ".join(part for part in said if part)

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Nothing can be put on an input before :meth:`fit` has found it.

        Raises:
            InputError: always.
        """
        raise unfitted(self.threat)

    def fit(self, system: System, goal: Goal, seed: int) -> FixedPerturbation:
        """Search for the variable on the images ``goal.x`` ``[N, C, H, W]``.

        It is the last iterate, as published.
        """
        streams = Streams.of(goal.x, seed, "shared")
        rows, dead = mini_batches(len(goal.x), self.batch_size, seed), False
        with unchecked(), torch.set_grad_enabled(self.direction.needs_graph):
            variable = self.threat.start(goal.x[:1])
            memory, before = self.update.begin(variable), self._mean_rank(system, goal, streams, variable)
            for now in range(self.steps):
                problem = self._problem(system, goal, streams, next(rows), now)
                spread = variable.expand(len(problem.goal.x), *variable.shape[1:])
                found = self.direction(problem, spread, now == 0)
                dead = dead or bool(found.no_map_gradient.all())
                mean = found.gradient.mean(0, keepdim=True)
                moved, memory = self.update(variable, mean, problem.progress, memory)
                variable = self.threat.project(goal.x[:1], moved).detach()
            after = self._mean_rank(system, goal, streams, variable)
            stalled = not any(now < then for now, then in zip(after, before, strict=True))
        if dead:
            warnings.warn(
                "the map's gradient was exactly zero for every image of the first mini-batch: this looks like "
                "robustness and may not be; give the attack a surrogate, or attack a map that is not itself a gradient",
                ZeroMapGradientWarning,
                stacklevel=3,
            )
        return FixedPerturbation(self.threat, self.objective, self.summary, variable, stalled, dead)

    def _problem(self, system: System, goal: Goal, streams: Streams, rows: Tensor, now: int) -> StepContext:
        mine, own = goal.select(rows), streams.select(rows)
        progress = now / max(self.steps - 1, 1)
        return StepContext(system, self.threat.bind(mine.x, own), mine, self.objective, own, progress, now)

    @torch.no_grad()
    def _mean_rank(self, system: System, goal: Goal, streams: Streams, variable: Tensor) -> tuple[float, float]:
        """Unmet constraints and the loss that decides among equals, means over the images."""
        unmet, score = 0.0, 0.0
        for rows in torch.arange(len(goal.x)).split(self.batch_size):
            problem = self._problem(system, goal, streams, rows, self.steps - 1)
            look = problem.observe(variable.expand(len(rows), *variable.shape[1:]))
            far, loss = rank(self.objective, look, problem.goal)
            unmet, score = unmet + float(far.double().sum()), score + float(loss.double().sum())
        return unmet / len(goal.x), score / len(goal.x)


def unfitted(threat: Threat) -> InputError:
    """What to say to who runs an attack before it is fitted."""
    return InputError(
        f"this attack is computed on images first: attack = attack.fitted(system, x, y), with images and labels of the "
        f"adversary's own, and then attack(system, ...); nothing has been fitted for its threat {threat.summary!r}"
    )


def mini_batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of mini-batches without end, in a new order once all have been seen."""
    draws = generator(seed, "mini-batches")
    while True:
        yield from torch.randperm(count, generator=draws).split(size)


@dataclass(frozen=True, eq=False)
class FixedPerturbation(Plan):
    """What was fitted, put on every input as it is: no search, and no input shown to the system.

    Args:
        threat: how the variable changes an input; what is random in it is drawn from the input's own stream.
        objective: what it was fitted to.
        said: how it was looked for.
        variable: ``[1, ...]``, shared by all inputs.
        stalled: whether neither the unmet constraints nor the loss fell, on average over the images it was fitted on.
        no_map_gradient: whether the map's gradient was exactly zero there.
    """

    threat: Threat
    objective: Objective
    said: str
    variable: Tensor
    stalled: bool = False
    no_map_gradient: bool = False

    @property
    def aim(self) -> Objective:
        """What it was fitted to."""
        return self.objective

    @property
    def summary(self) -> str:
        """How it was looked for."""
        return self.said

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """The inputs with the variable on them; ``stalled`` and ``no_map_gradient`` are the fit's."""
        count = len(goal.x)
        variable = self.variable.to(goal.x).expand(count, *self.variable.shape[1:])
        x = self.threat.bind(goal.x, streams).apply(goal.x, variable).detach()
        stalled, dead, no = (
            torch.full((count,), said, device=x.device) for said in (self.stalled, self.no_map_gradient, False)
        )
        return SearchResult(x, torch.zeros(count, dtype=torch.int64, device=x.device), dead, stalled, no)


@dataclass(frozen=True, eq=False)
class Fitted(Attack):
    """A fitted attack: puts its one perturbation on every input.

    Success is judged by the caller's goal: a perturbation fitted towards one class succeeds, for a caller who asks for
    another, where that other one is predicted.

    Args:
        of: the attack that was fitted.
        applied: what was found; ``applied.variable`` is the perturbation or the patch.
    """

    of: Attack
    applied: FixedPerturbation

    def plan(self, system: System) -> Plan:
        """Put it on."""
        return self.applied


def fit_universal(attack: Attack, system: System, x: Tensor, y: Tensor, goal_class: int | None) -> Fitted:
    """Fit an attack whose plan is a :class:`UniversalSearch`.

    Args:
        attack: not fitted yet.
        system: whom it is fitted against.
        x: ``[N, C, H, W]`` in ``[0, 1]``, images of the adversary's own.
        y: ``[N]``, their labels.
        goal_class: what every image should be predicted as; ``None``: anything but its label.

    Raises:
        InputError: bad tensors, a goal class out of range, or a goal class that every image has.
        NotDifferentiableError: the attack needs the gradient of maps that have none.
    """
    plan = attack.plan(system)
    if not isinstance(plan, UniversalSearch):
        raise InputError(f"{type(attack).__name__} plans no UniversalSearch: it cannot be fitted by fit_universal")
    goal = fitting_goal(attack, system, x, y, goal_class)
    return Fitted(attack, plan.fit(system, goal, attack.seed), seed=attack.seed)


def fitting_goal(attack: Attack, system: System, x: Tensor, y: Tensor, goal_class: int | None) -> Goal:
    """The checked goal of a fit; images of the goal class itself, where there is nothing to attack, are left out."""
    attack._check(system, x, y, None, None)
    label = y.to(x.device, torch.int64)
    if goal_class is None:
        return Goal(x.detach(), label)
    wanted = torch.full_like(label, goal_class)
    with torch.no_grad():
        checks.classes(wanted, len(x), system.model(x[:1]).shape[1], "goal_class")
    others = label != wanted
    if not bool(others.any()):
        raise InputError(f"every image is of goal_class {goal_class} already: there is nothing to fit")
    return Goal(x.detach()[others], label[others], wanted[others])
