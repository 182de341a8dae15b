"""The first adversarial examples: a box-constrained quasi-Newton search for the smallest change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustexplain.fields import Count, Positive
from robustexplain.objectives import Distance, Goal, Misclassify, Objective, Traded
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..search.directions import GradientDirection, StepContext, observe
from ..search.loop import Plan, SearchResult
from ..threat import Threat
from .carlini_wagner import Box, Constants, Nearest, met


@dataclass(frozen=True)
class _LineSearch(Plan):
    """L-BFGS-B for each constant and each sample on its own."""

    threat: Threat
    deceives: Objective
    """What an image must meet to count: the prediction (and a detector's silence)."""
    silent: Objective
    direction: GradientDirection
    initial: float
    rounds: int
    steps: int

    @property
    def aim(self) -> Objective:
        return Distance() + self.deceives

    @property
    def summary(self) -> str:
        return f"L-BFGS-B, {self.rounds} constants"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        rows = [self._one(system, goal.select(torch.tensor([i])), streams.select([i])) for i in range(len(goal.x))]
        x, queries, found = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return SearchResult.of(x, queries, ~found)

    def _one(self, system: System, goal: Goal, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        constants, nearest = Constants.first(goal.x, self.initial), Nearest.none(goal.x)
        aimed, queries = (goal, 0) if goal.goal_class is not None else (_at_runner_up(system, goal), 1)
        for _ in range(self.rounds):
            traded = replace(aimed, trade=constants.now)
            objective = Distance() + Traded(Misclassify()) + self.silent
            x, used = self._minimised(StepContext(system, self.threat, traded, objective, streams, 1.0))
            success = met(self.deceives, system, goal, x)
            queries += used + 1
            nearest.update(goal.x, x, success)
            constants.tried(success)
        return nearest.x, torch.full_like(goal.label, queries), nearest.found

    def _minimised(self, context: StepContext) -> tuple[Tensor, int]:
        """The minimiser ``[1, C, H, W]``, and how many inputs finding it took."""
        from scipy.optimize import Bounds, minimize  # type: ignore[import-untyped]

        benign = context.goal.x
        queries = 0

        def value(point: Any) -> tuple[float, Any]:
            nonlocal queries
            # The draws of every call are the same: the function that is minimised stays one function.
            found = self.direction(context, torch.as_tensor(point).to(benign).reshape(benign.shape), False)
            queries += found.queries
            return float(found.loss.sum()), found.gradient.flatten().to("cpu", torch.float64).numpy()

        start = benign.flatten().to("cpu", torch.float64).numpy().copy()
        options = {"maxiter": self.steps}
        found = minimize(value, start, jac=True, method="L-BFGS-B", bounds=Bounds(0, 1), options=options)
        x = torch.as_tensor(np.clip(found.x, 0, 1)).to(benign).reshape(benign.shape)
        return x, queries


@torch.no_grad()
def _at_runner_up(system: System, goal: Goal) -> Goal:
    """The goal of being predicted as the class that is most likely but for the label."""
    logits = observe(system, goal.x, goal, frozenset()).logits
    return replace(goal, goal_class=logits.scatter(1, goal.label[:, None], -torch.inf).argmax(1))


@ATTACKS.register("lbfgs", paper="Szegedy et al. 2014, section 4.1", needs=("gradients",))
@dataclass(frozen=True)
class LBFGS(Attack):
    """The nearest image in L2 that is predicted as wanted: ``||x' - x||^2 + c loss`` by box-constrained L-BFGS.

    The loss is the cross-entropy towards the goal class. The paper minimises ``c |r| + loss`` and says little of its
    line search; as in later implementations the constant weighs the loss, the distance is squared, and for each sample
    the constant is searched by tens and then bisected. The paper attacks towards a class; untargeted we go towards the
    runner-up, and any other class will do (away from the label the loss has no minimum, and far too much changes).
    Samples are minimised one after the other: the search's steps depend on its past. A sample for which no constant
    succeeds is returned as it came, and reported as stalled.

    Args:
        steps: iterations of L-BFGS-B, for each constant.
        search_steps: constants tried.
        initial_constant: the first one.
        adapt: to a defense.
    """

    steps: Count = 100
    search_steps: Count = 9
    initial_constant: Positive = 1e-2
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """L-BFGS-B for each constant."""
        silent, direction = self.adapt.evasion(system), self.adapt.direction()
        deceives = Misclassify() + silent
        return _LineSearch(Box(), deceives, silent, direction, self.initial_constant, self.search_steps, self.steps)
