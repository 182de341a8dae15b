"""Attacks on the explanation that keep the prediction: Ghorbani et al. 2019."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.autograd.rectifiers import Softplus
from robustexplain.fields import Count, Eps, NonNegative, Positive
from robustexplain.objectives import DropTopK, FillRegion, KeepPrediction, Objective, ShiftCenter, TopKLeft
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import evasion
from ..base import Attack
from ..goals import random_patch_maps
from ..search.directions import Direction, DirectionResult, GradientDirection, StepContext
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import SignStep
from ..threat import Linf


@dataclass(frozen=True)
class RandomSign(Direction):
    """The sign of normal noise, drawn anew at every step: the control that a map's gradient has to beat."""

    needs_graph = False

    @property
    def summary(self) -> str:
        """Random."""
        return "random signs"

    @torch.no_grad()
    def __call__(self, problem: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """One draw; the look that judges is at the real system."""
        seen = problem.observe(variable)
        noise = problem.streams.normal(variable).sign()
        return DirectionResult(
            noise, problem.loss(seen), seen, torch.zeros_like(problem.goal.label, dtype=torch.bool), 1
        )


@dataclass(frozen=True)
class _Ghorbani(Attack):
    """Sign steps on a measure of the map alone; what counts is the best iterate that keeps the label.

    Departures from the code of Ghorbani et al.: the derivative of an integrated gradient is exact (they weigh those of
    its points); the surrogate is a softplus of ``beta = 10`` (theirs of 1 is farther from a deep network's rectifiers:
    on a ResNet-20 it leaves three times as many of the top pixels in place); centres are those of the
    real network, not truncated to whole pixels.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        steps: iterations.
        step_size: of one step.
        surrogate: what rectifiers compute while directions are sought; ``auto`` is ``softplus`` for maps that are
            gradients and nothing for others.
        beta: of ``softplus``.
        keep: weight of the squared change of the probabilities; 0 as published, where the label is a condition only.
        judge_every: how often a surrogate's iterate is shown to the real system; 1 as published.
        restarts: run this often and keep the best; all but the first begin at random.
        draws: average directions over so many draws of what is random in the system.
        straight: go straight through rounding inside the model.
        evade: weight of the detector's soft score; 0 ignores it (see :meth:`adapted`).
    """

    eps: Eps = 8 / 255
    steps: Count = 300
    step_size: Positive = 0.5 / 255
    surrogate: Surrogate = "auto"
    beta: Positive = 10.0
    keep: NonNegative = 0.0
    judge_every: Count = 1
    restarts: Count = 1
    draws: Count = 1
    straight: bool = False
    evade: NonNegative = 0.0

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True

    @property
    @abstractmethod
    def measure(self) -> Objective:
        """What is wanted of the map."""

    def adapted(self, system: System) -> Attack:
        """With the detector's soft score in the loss, and its silence as a condition, if there is a detector."""
        return self if system.detector is None or self.evade else replace(self, evade=1.0)

    def plan(self, system: System) -> Plan:
        """Sign descent on the measure; the label (and the detector's silence) are conditions."""
        objective = self.measure + self.keep * KeepPrediction() + evasion(self.evade, system)
        stage = Stage(objective, self.steps, SignStep(self.step_size))
        direction = GradientDirection(
            surrogate_for(system.interpreter, self.surrogate, softplus=Softplus(self.beta), auto="softplus"),
            self.straight,
            self.draws,
        )
        return Search(Linf(self.eps), (stage,), direction, self.judge_every, restarts=self.restarts)


@ATTACKS.register(
    "ghorbani-topk", paper="Ghorbani et al. 2019, Algorithm 1 (top-k)", needs=("gradients", "differentiable maps")
)
@dataclass(frozen=True)
class GhorbaniTopK(_Ghorbani):
    """Take the map's weight off the pixels that mattered most, and keep the prediction.

    The loss is the map's share on the benign top ``k``; the returned iterate is the one with the smallest top-``k``
    intersection among those that keep the label. The other fields are those of all these attacks (:class:`_Ghorbani`).

    Args:
        k: how many pixels: a count from 1 on (Ghorbani et al.: 1000 of 227 x 227), a share below 1.
    """

    k: Positive = 0.1

    moves_map: ClassVar[bool] = True

    @property
    def measure(self) -> Objective:
        """The share on the benign top ``k``; the intersection decides."""
        return DropTopK(self.k) + TopKLeft(self.k)


@ATTACKS.register(
    "ghorbani-center",
    paper="Ghorbani et al. 2019, Algorithm 1 (mass-center)",
    needs=("gradients", "differentiable maps"),
)
@dataclass(frozen=True)
class GhorbaniCenter(_Ghorbani):
    """Move the map's centre of mass as far as it goes, and keep the prediction."""

    moves_map: ClassVar[bool] = True

    @property
    def measure(self) -> Objective:
        """The distance of the centres."""
        return ShiftCenter()


@ATTACKS.register(
    "ghorbani-region", paper="Ghorbani et al. 2019, section 3 (targeted)", needs=("gradients", "differentiable maps")
)
@dataclass(frozen=True)
class GhorbaniRegion(_Ghorbani):
    """Gather the map's weight where the goal map is high (default: a random patch), and keep the prediction."""

    @property
    def measure(self) -> Objective:
        """The share inside."""
        return FillRegion()

    def default_goal_map(self, x: Tensor) -> Tensor:
        """A random patch: the benign map would leave nothing to do."""
        return random_patch_maps(x, self.seed)


@ATTACKS.register("ghorbani-random", paper="Ghorbani et al. 2019, Algorithm 1 (random sign perturbation)")
@dataclass(frozen=True)
class GhorbaniRandom(Attack):
    """Add up random signs in the ball: the control of the attacks on maps, with their ball, steps and acceptance.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        steps: iterations; as many looks at the system.
        step_size: of one step.
        aim: which measure is best: the smallest ``top-k`` intersection, or the farthest ``center``.
        k: of ``top-k``: a count from 1 on, a share of the pixels below 1.
    """

    eps: Eps = 8 / 255
    steps: Count = 300
    step_size: Positive = 0.5 / 255
    aim: Literal["top-k", "center"] = "top-k"
    k: Positive = 0.1

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True
    moves_map: ClassVar[bool] = True

    def differentiates(self, system: System) -> bool:
        """Never: any interpreter will do."""
        return False

    def plan(self, system: System) -> Plan:
        """The same steps, ball and acceptance, with directions out of nowhere."""
        measure = ShiftCenter(0.0) if self.aim == "center" else DropTopK(self.k) + TopKLeft(self.k)
        stage = Stage(measure + 0.0 * KeepPrediction(), self.steps, SignStep(self.step_size))
        return Search(Linf(self.eps), (stage,), RandomSign())
