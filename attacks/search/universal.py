"""One variable for all inputs, fitted on the adversary's images and then applied to any input unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustexplain import checks
from robustexplain.door import answer
from robustexplain.errors import InputError
from robustexplain.fields import Count, check_fields
from robustexplain.interpreters import unchecked
from robustexplain.objectives import Goal, Objective
from robustexplain.random_streams import Streams, generator
from robustexplain.rounding import wide
from robustexplain.system import System

from ..base import Attack, rescaled
from ..threat import Threat
from .best import rank
from .directions import Direction, GradientDirection, StepContext
from .loop import Plan, SearchResult
from .updates import Update


@dataclass(frozen=True)
class UniversalSearch(Plan):
    """One variable for all images: each step moves it along the mean gradient of a mini-batch.

    Random choices of the threat model (a patch's place) are drawn again for every image and step, so the objective is
    an expectation over them (expectation over transformation, Athalye et al. 2018b).

    Args:
        threat: the set of allowed variables.
        objective: minimised on average over the images.
        steps: number of mini-batches.
        update: the step along a gradient.
        batch_size: images per step; their order is drawn again after each pass through all of them.
        direction: gives the gradients.
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
        """The update and its direction."""
        words = (type(self.update).__name__, self.direction.summary, "on mini-batches")
        return ", ".join(word for word in words if word)

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Always an error: the variable must be fitted first, by :meth:`fit`.

        Raises:
            InputError: always.
        """
        raise unfitted(self.threat)

    def fit(self, system: System, goal: Goal, seed: int) -> FixedPerturbation:
        """Fit the variable to the images ``goal.x`` ``[N, C, H, W]``; the last iterate, as published."""
        streams = Streams.of(goal.x, seed, "shared")
        rows, zero = mini_batches(len(goal.x), self.batch_size, seed), False
        with unchecked(), torch.set_grad_enabled(self.direction.needs_graph):
            variable = self.threat.start(goal.x[:1])
            memory, before = self.update.begin(variable), self._mean_rank(system, goal, streams, variable)
            for now in range(self.steps):
                context = self._context(system, goal, streams, next(rows), now)
                shared = variable.expand(len(context.goal.x), *variable.shape[1:])
                found = self.direction(context, shared, now == 0)
                zero = zero or bool(found.zero_direction.all())
                mean = found.gradient.mean(0, keepdim=True)
                moved, memory = self.update(variable, mean, context.progress, memory)
                variable = self.threat.project(goal.x[:1], moved).detach()
            after = self._mean_rank(system, goal, streams, variable)
            stalled = not any(now < then for now, then in zip(after, before, strict=True))
        if zero:
            message = f"for every image of the first mini-batch there is no direction: {self.direction.zero_means}"
            warnings.warn(message, self.direction.zero_warning, stacklevel=3)
        return FixedPerturbation(self.threat, self.objective, self.summary, variable, stalled, zero)

    def _context(self, system: System, goal: Goal, streams: Streams, rows: Tensor, now: int) -> StepContext:
        goal, streams = goal.select(rows), streams.select(rows)
        progress = now / max(self.steps - 1, 1)
        return StepContext(system, self.threat.bind(goal.x, streams), goal, self.objective, streams, progress, now)

    @torch.no_grad()
    def _mean_rank(self, system: System, goal: Goal, streams: Streams, variable: Tensor) -> tuple[float, float]:
        """Unmet constraints and the loss that decides among equals, means over the images."""
        unmet, score = 0.0, 0.0
        for rows in torch.arange(len(goal.x)).split(self.batch_size):
            context = self._context(system, goal, streams, rows, self.steps - 1)
            seen = context.observe(variable.expand(len(rows), *variable.shape[1:]))
            unmet_part, loss = rank(self.objective, seen, context.goal)
            unmet, score = unmet + float(unmet_part.double().sum()), score + float(loss.double().sum())
        return unmet / len(goal.x), score / len(goal.x)


def unfitted(threat: Threat) -> InputError:
    """The error of an attack that is run before it is fitted."""
    return InputError(
        f"this attack is computed on images first: attack = attack.fitted(system, x, y), with images and labels of the "
        f"adversary's own, and then attack(system, ...); nothing has been fitted for its threat {threat.summary!r}"
    )


def mini_batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless indices of mini-batches, in a new random order after each pass."""
    draws = generator(seed, "mini-batches")
    while True:
        yield from torch.randperm(count, generator=draws).split(size)


@dataclass(frozen=True, eq=False)
class FixedPerturbation(Plan):
    """Applies a fitted variable to every input: no search and no queries.

    Args:
        threat: applies the variable; its random choices are drawn from the input's own stream.
        objective: the objective of the fit.
        search: the summary of the fit's search, for tables.
        variable: ``[1, ...]``, shared by all inputs.
        stalled: whether neither the unmet constraints nor the loss fell, on average over the images it was fitted on.
        zero_direction: whether the fit's first direction was exactly zero for every image.
    """

    threat: Threat
    objective: Objective
    search: str
    variable: Tensor
    stalled: bool = False
    zero_direction: bool = False

    @property
    def aim(self) -> Objective:
        """The objective of the fit."""
        return self.objective

    @property
    def summary(self) -> str:
        """The summary of the fit's search."""
        return self.search

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """The inputs with the variable applied; ``stalled`` and ``zero_direction`` are those of the fit."""
        count = len(goal.x)
        variable = self.variable.to(wide(goal.x)).expand(count, *self.variable.shape[1:])
        x = self.threat.bind(goal.x, streams).apply(goal.x, variable).detach()
        yes = torch.ones(count, dtype=torch.bool, device=x.device)
        return SearchResult(
            x=x,
            queries=torch.zeros(count, dtype=torch.int64, device=x.device),
            zero_direction=yes & self.zero_direction,
            stalled=yes & self.stalled,
            surrogate_misled=~yes,
        )


@dataclass(frozen=True, eq=False)
class Fitted(Attack):
    """A fitted attack: applies its one perturbation to every input.

    Success depends on the goal of the call: if a caller asks for another class than the perturbation was fitted to, it
    succeeds where that other class is predicted.

    Args:
        of: the attack that was fitted.
        applied: the plan with the result; ``applied.variable`` is the perturbation or the patch.
    """

    of: Attack
    applied: FixedPerturbation

    def plan(self, system: System) -> Plan:
        """Apply the perturbation."""
        return self.applied


def fit_universal(attack: Attack, system: System, x: Tensor, y: Tensor, goal_class: int | None) -> Fitted:
    """Fit an attack whose plan is a :class:`UniversalSearch`.

    Args:
        attack: to be fitted.
        system: the system that it is fitted against.
        x: ``[N, C, H, W]`` in ``[0, 1]``, the adversary's images.
        y: ``[N]``, their labels.
        goal_class: the class to be predicted for every image; ``None``: any but its label.

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
    """The goal of a fit, checked; images that have the goal class already are left out."""
    first = attack._check(system, x, y, None, None)
    label = y.to(x.device, torch.int64)
    if goal_class is None:
        return _one_scale(rescaled(system, Goal(x.detach(), label), first))
    wanted = torch.full_like(label, goal_class)
    with torch.no_grad():
        checks.classes(wanted, len(x), answer(system.model, x[:1]).shape[1], "goal_class")
    others = label != wanted
    if not bool(others.any()):
        raise InputError(f"every image is of goal_class {goal_class} already: there is nothing to fit")
    return _one_scale(rescaled(system, Goal(x.detach()[others], label[others], wanted[others]), first))


def _one_scale(goal: Goal) -> Goal:
    """One scale for all images: a mean over them weighs them as on a network with logits of the usual size."""
    return goal if goal.scale is None else replace(goal, scale=goal.scale.median().expand_as(goal.scale))
