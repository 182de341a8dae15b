"""Attacks on the prediction alone, and the controls that any attack must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from robustexplain.fields import Count, Fraction, Positive, Radius
from robustexplain.objectives import Goal, Misclassify
from robustexplain.registry import ATTACKS
from robustexplain.streams import Streams
from robustexplain.system import System

from .base import Attack
from .search import Found, NormalisedStep, Search, SignStep, Stage, Update
from .threat import L2, Linf, Threat

Norm = Literal["linf", "l2"]


def ball(norm: Norm, eps: float) -> Threat:
    """The ball of radius ``eps`` in a norm; an L-infinity radius above 1 is refused."""
    return Linf(eps) if norm == "linf" else L2(eps)


def step(norm: Norm, size: float) -> Update:
    """The steepest-descent step of a norm."""
    return SignStep(size) if norm == "linf" else NormalisedStep(size)


@ATTACKS.register("clean")
@dataclass(frozen=True)
class Clean(Attack):
    """No change: the benign input itself."""

    def _search(self, system: System, goal: Goal, streams: Streams) -> Found:
        return Found(goal.x.clone(), torch.zeros(len(goal.x), dtype=torch.bool, device=goal.x.device))


@ATTACKS.register("noise")
@dataclass(frozen=True)
class Noise(Attack):
    """Random noise at the attack's own norm: the control. A defense earns nothing by stopping it.

    Args:
        eps: radius, in the units of ``[0, 1]`` pixels.
        kind: ``uniform`` in the box, ``sign`` (a random corner of it), or ``gaussian`` (scaled to the norm).
        norm: ``linf`` or ``l2``.
    """

    eps: Radius = 8 / 255
    kind: Literal["uniform", "sign", "gaussian"] = "uniform"
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def _search(self, system: System, goal: Goal, streams: Streams) -> Found:
        x, threat = goal.x, ball(self.norm, self.eps)
        if self.kind == "sign":
            noisy = x + self.eps * (streams.uniform(x) - 0.5).sign()
        elif self.kind == "gaussian":
            noisy = x + self.eps / 2 * streams.normal(x)
        else:
            noisy = threat.sample(x, streams)
        return Found(threat.project(x, noisy), torch.zeros(len(x), dtype=torch.bool, device=x.device))


@ATTACKS.register("fgsm", paper="Goodfellow et al. 2015", needs=("gradients",))
@dataclass(frozen=True)
class FGSM(Attack):
    """Fast gradient sign method: one sign step of length ``eps``.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
    """

    eps: Fraction = 8 / 255

    def _search(self, system: System, goal: Goal, streams: Streams) -> Found:
        objective = Misclassify()
        # The published attack is its one step, not the better of that step and the start.
        search = Search(Linf(self.eps), (Stage(objective, 1, SignStep(self.eps)), Stage(objective, 0, SignStep(0.0))))
        return search.run(system, goal, streams)


@ATTACKS.register("pgd", paper="Madry et al. 2018; Zhang et al. 2020, eq. 1", needs=("gradients",))
@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent on the cross-entropy, targeted if a goal class is given.

    The best iterate is the one with the lowest loss among those that are predicted as wanted.

    Args:
        eps: radius of the ball; Zhang et al. use 0.031 in L-infinity.
        steps: iterations.
        step_size: of one step; Zhang et al. use 1/255.
        norm: ``linf`` (sign steps) or ``l2`` (steps of length ``step_size`` along the gradient).
        random_start: begin at a random point of the ball.
        restarts: run this often, keep the best.
        early_stop: stop a sample at its first success.
    """

    eps: Radius = 8 / 255
    steps: Count = 40
    step_size: Positive = 1 / 255
    norm: Norm = "linf"
    random_start: bool = False
    restarts: Count = 1
    early_stop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def _search(self, system: System, goal: Goal, streams: Streams) -> Found:
        search = Search(
            ball(self.norm, self.eps),
            (Stage(Misclassify(), self.steps, step(self.norm, self.step_size)),),
            random_start=self.random_start,
            restarts=self.restarts,
            early_stop=self.early_stop,
        )
        return search.run(system, goal, streams)
