"""Attacks on the explanation that keep the prediction: Ghorbani et al. 2019."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.autograd.rectifiers import Softplus
from robustexplain.fields import Count, Eps, NonNegative, Positive
from robustexplain.objectives import DropTopK, FillRegion, KeepPrediction, Objective, ShiftCenter, TopKLeft
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..goals import random_patch_maps
from ..search.directions import Direction, DirectionResult, StepContext
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import SignStep
from ..threat import Linf


@dataclass(frozen=True)
class RandomSign(Direction):
    """The sign of normal noise, drawn at every step: a control for directions from the gradient of a map."""

    needs_graph: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        """Random."""
        return "random signs"

    @torch.no_grad()
    def __call__(self, context: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """One draw, and an evaluation of the real system."""
        seen = context.observe(variable)
        noise = context.streams.normal(variable).sign()
        no = torch.zeros_like(context.goal.label, dtype=torch.bool)
        return DirectionResult(noise, context.loss(seen), seen, no, 1)


@dataclass(frozen=True)
class _Ghorbani(Attack):
    """Sign steps on a measure of the map; returns the best iterate that keeps the label.

    Departures from the code of Ghorbani et al.: the derivative of an integrated gradient is exact (they use a weighted
    sum over its points); the surrogate is a softplus of ``beta = 10`` (theirs of 1 is a worse approximation of the
    rectifiers: on a ResNet-20 it leaves three times as many of the top pixels in place); centres are those of the
    real network, not truncated to whole pixels.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        steps: iterations.
        step_size: of one step.
        surrogate: replaces the rectifiers while gradients are computed; ``auto`` is ``softplus`` for maps that are
            gradients and none for others.
        beta: of ``softplus``.
        keep: weight of the squared change of the probabilities; 0 as published, where the label is only a constraint.
        evaluate_every: with a surrogate, the real system is evaluated every so many steps; 1 as published.
        restarts: number of runs, of which the best counts; all but the first begin at random.
        adapt: to a defense.
    """

    eps: Eps = 8 / 255
    steps: Count = 300
    step_size: Positive = 0.5 / 255
    surrogate: Surrogate = "auto"
    beta: Positive = 10.0
    keep: NonNegative = 0.0
    evaluate_every: Count = 1
    restarts: Count = 1
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True

    @property
    @abstractmethod
    def measure(self) -> Objective:
        """The objective on the map."""

    def plan(self, system: System) -> Plan:
        """Sign descent on the measure; the label (and no alarm of a detector) are constraints."""
        objective = self.measure + self.keep * KeepPrediction() + self.adapt.evasion(system)
        stage = Stage(objective, self.steps, SignStep(self.step_size))
        smooth = surrogate_for(system.interpreter, self.surrogate, softplus=Softplus(self.beta), auto="softplus")
        direction = self.adapt.direction(smooth)
        return Search(Linf(self.eps), (stage,), direction, self.evaluate_every, restarts=self.restarts)


@ATTACKS.register(
    "ghorbani-topk", paper="Ghorbani et al. 2019, Algorithm 1 (top-k)", needs=("gradients", "differentiable maps")
)
@dataclass(frozen=True)
class GhorbaniTopK(_Ghorbani):
    """Lower the attribution of the pixels ranked highest, and keep the prediction.

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
    """Move the map's centre of mass as far as possible, and keep the prediction."""

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
    """Move attribution to where the goal map is high (default: a random patch), and keep the prediction."""

    @property
    def measure(self) -> Objective:
        """The share inside."""
        return FillRegion()

    def default_goal_map(self, x: Tensor) -> Tensor:
        """A random patch, since the benign map is the start."""
        return random_patch_maps(x, self.seed)


@ATTACKS.register("ghorbani-random", paper="Ghorbani et al. 2019, Algorithm 1 (random sign perturbation)")
@dataclass(frozen=True)
class GhorbaniRandom(Attack):
    """Random sign steps: a control for the attacks on maps, with the same ball, steps and acceptance.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        steps: iterations, with one query each.
        step_size: of one step.
        aim: the measure that decides: the smallest ``top-k`` intersection, or the farthest ``center``.
        k: of ``top-k``: a count from 1 on, a share of the pixels below 1.
    """

    eps: Eps = 8 / 255
    steps: Count = 300
    step_size: Positive = 0.5 / 255
    aim: Literal["top-k", "center"] = "top-k"
    k: Positive = 0.1

    control: ClassVar[bool] = True
    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True
    moves_map: ClassVar[bool] = True

    def differentiates(self, system: System) -> bool:
        """Never: it uses the maps' values only."""
        return False

    def plan(self, system: System) -> Plan:
        """The same steps, ball and acceptance, with random directions."""
        measure = ShiftCenter(0.0) if self.aim == "center" else DropTopK(self.k) + TopKLeft(self.k)
        stage = Stage(measure + 0.0 * KeepPrediction(), self.steps, SignStep(self.step_size))
        return Search(Linf(self.eps), (stage,), RandomSign())
