"""Attacks that some trainings are published with and that nobody runs outside of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from robustexplain.attacks import Attack, Linf
from robustexplain.attacks.adaptive import Adaptation
from robustexplain.attacks.search.loop import Plan, Search, Stage
from robustexplain.attacks.search.updates import SignStep
from robustexplain.door import answer
from robustexplain.fields import Count, Eps, Fraction, NonNegative, Positive
from robustexplain.objectives import Distill, Goal, Misclassify
from robustexplain.random_streams import Streams
from robustexplain.rounding import wide
from robustexplain.system import System


@dataclass(frozen=True)
class StartedBall(Linf):
    """An L-infinity ball in which a random start is not uniform.

    Args:
        start_kind: ``gaussian`` noise of deviation ``distance``, or the ``sign`` of it times ``distance``.
        distance: in the units of ``[0, 1]`` pixels.
    """

    start_kind: Literal["gaussian", "sign"] = "gaussian"
    distance: NonNegative = 1e-3

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Noise around ``x``, before projection."""
        noise = wide(streams.normal(x))
        return x + self.distance * (noise.sign() if self.start_kind == "sign" else noise)


@dataclass(frozen=True)
class Divergence(Attack):
    """Sign ascent on ``KL(f(x) || f(x'))``: the inner attack of TRADES, which needs no label.

    Its objective is ``-sum_k p_k(x) log p_k(x')``, which differs from the divergence by a constant. It begins near
    ``x``, where the gradient is zero, and returns the last iterate, as published.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        steps: iterations.
        step_size: of one step.
        start: deviation of the Gaussian noise that it begins with.
        adapt: to a defense.
    """

    eps: Eps = 0.031
    steps: Count = 10
    step_size: Positive = 0.007
    start: Positive = 1e-3
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """Sign ascent from noise."""
        stage = Stage(-1.0 * Distill(), self.steps, SignStep(self.step_size))
        ball = StartedBall(self.eps, start_kind="gaussian", distance=self.start)
        return Search(ball, (stage,), self.adapt.direction(), random_start=True, returns="last")

    def _goal(self, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None) -> Goal:
        goal = super()._goal(system, x, y, goal_class, goal_map)
        with torch.no_grad():
            return replace(goal, wanted=answer(system.model, x).softmax(1))


@dataclass(frozen=True)
class RandomFGSM(Attack):
    """R+FGSM: a random sign step of length ``alpha``, then a gradient's of ``eps - alpha`` (Tramèr et al. 2018).

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        share: ``alpha / eps``; 0 is FGSM.
        adapt: to a defense.
    """

    eps: Eps = 16 / 255
    share: Fraction = 0.5
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """One step from a random corner of the smaller box, and its result even if the start is better."""
        alpha = self.share * self.eps
        stage = Stage(Misclassify(), 1, SignStep(self.eps - alpha))
        ball = StartedBall(self.eps, start_kind="sign", distance=alpha)
        return Search(ball, (stage,), self.adapt.direction(), random_start=True, returns="last")
