"""L-BFGS, the first attack (Szegedy et al. 2014): a box-constrained quasi-Newton search for the smallest change."""

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
    """L-BFGS-B for each constant, one sample after the other."""

    threat: Threat
    deceives: Objective
    """Constraints of a successful image: the prediction (and no alarm of a detector)."""
    no_alarm: Objective
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
        targeted, queries = (goal, 0) if goal.goal_class is not None else (_at_runner_up(system, goal), 1)
        for _ in range(self.rounds):
            traded = replace(targeted, trade=constants.now)
            objective = Distance() + Traded(Misclassify()) + self.no_alarm
            x, used = self._minimised(StepContext(system, self.threat, traded, objective, streams, 1.0))
            success = met(self.deceives, system, goal, x)
            queries += used + 1
            nearest.update(goal.x, x, success)
            constants.tried(success)
        return nearest.x, torch.full_like(goal.label, queries), nearest.found

    def _minimised(self, context: StepContext) -> tuple[Tensor, int]:
        """The minimiser ``[1, C, H, W]``, and the number of queries."""
        from scipy.optimize import Bounds, minimize  # type: ignore[import-untyped]

        benign = context.goal.x
        queries = 0

        def value(point: Any) -> tuple[float, Any]:
            nonlocal queries
            # Every call uses the same random draws, so that one fixed function is minimised.
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
    """The goal with the most likely class other than the label as goal class."""
    logits = observe(system, goal.x, goal, frozenset()).logits
    return replace(goal, goal_class=logits.scatter(1, goal.label[:, None], -torch.inf).argmax(1))


@ATTACKS.register("lbfgs", paper="Szegedy et al. 2014, section 4.1", needs=("gradients",))
@dataclass(frozen=True)
class LBFGS(Attack):
    """The nearest image in L2 that is predicted as wanted: ``||x' - x||^2 + c loss`` by box-constrained L-BFGS.

    The loss is the cross-entropy towards the goal class. The paper minimises ``c |r| + loss`` and gives few
    details of its line search. As in later implementations the constant weights the loss, the distance is squared, and
    for each sample the constant is multiplied by ten until it succeeds and then bisected. The paper's attack is
    targeted; ours, untargeted, goes towards the runner-up, and any other class counts as a success (the negative loss
    of the label has no minimum and leads to far larger changes). Samples are minimised one after the other, since the
    steps of L-BFGS depend on its history. A sample for which no constant succeeds is returned unchanged and reported as
    stalled.

    Args:
        steps: iterations of L-BFGS-B, for each constant.
        search_steps: number of constants tried.
        initial_constant: the first constant.
        adapt: to a defense.
    """

    steps: Count = 100
    search_steps: Count = 9
    initial_constant: Positive = 1e-2
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """L-BFGS-B for each constant."""
        no_alarm, direction = self.adapt.evasion(system), self.adapt.direction()
        deceives = Misclassify() + no_alarm
        return _LineSearch(Box(), deceives, no_alarm, direction, self.initial_constant, self.search_steps, self.steps)
