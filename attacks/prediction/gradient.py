"""Gradient attacks on the prediction (FGSM, BIM, MI-FGSM, PGD), and the controls without a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from robustexplain import maps as ops
from robustexplain.checks import Kind
from robustexplain.fields import Count, Fraction, NonNegative, Positive, Radius
from robustexplain.objectives import Goal, Misclassify, Objective, Sum
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.rounding import wide
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..search.loop import Plan, Search, SearchResult, Stage
from ..search.updates import MomentumStep, NormalisedStep, SignStep, Update
from ..threat import L2, Linf, Norm, Threat


def ball(norm: Norm, eps: float) -> Threat:
    """The ball of radius ``eps`` in a norm; an L-infinity radius above 1 is refused."""
    return Linf(eps) if norm == "linf" else L2(eps)


def step(norm: Norm, size: float) -> Update:
    """The steepest-descent step of a norm."""
    return SignStep(size) if norm == "linf" else NormalisedStep(size)


@dataclass(frozen=True)
class _Drawn(Plan):
    """No search: the input unchanged or with noise."""

    threat: Threat
    kind: Literal["none", "uniform", "sign", "gaussian"]

    @property
    def aim(self) -> Objective:
        return Sum()

    @property
    def summary(self) -> str:
        return "none" if self.kind == "none" else f"{self.kind} noise"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        x = goal.x
        if self.kind == "none":
            return SearchResult.of(x.clone())
        noise = streams.normal(x) if self.kind == "gaussian" else streams.uniform(x, -1, 1)
        noise = wide(noise.sign() if self.kind == "sign" else noise)
        return SearchResult.of(self.threat.project(x, x + self._scale(noise) * noise))

    def _scale(self, noise: Tensor) -> Tensor | float:
        eps: float = self.threat.eps  # type: ignore[attr-defined]
        if self.threat.norm == "l2":
            return eps / ops.expand(noise.flatten(1).norm(dim=1), noise)
        return eps / 2 if self.kind == "gaussian" else eps


@ATTACKS.register("clean")
@dataclass(frozen=True)
class Clean(Attack):
    """No change: the benign input itself."""

    control: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images", "tables")

    def plan(self, system: System) -> Plan:
        """No change."""
        return _Drawn(Linf(0.0), "none")


@ATTACKS.register("noise")
@dataclass(frozen=True)
class Noise(Attack):
    """Random noise of the same norm as an attack: a control, against which a defense gets no credit.

    Args:
        eps: radius, in the units of ``[0, 1]`` pixels.
        kind: ``uniform`` in the box, ``sign`` (a random corner of it), or ``gaussian`` (of deviation ``eps / 2`` in
            L-infinity, clipped). In L2 each is scaled to length ``eps``.
        norm: ``linf`` or ``l2``.
    """

    eps: Radius = 8 / 255
    kind: Literal["uniform", "sign", "gaussian"] = "uniform"
    norm: Norm = "linf"

    control: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def plan(self, system: System) -> Plan:
        """One draw."""
        return _Drawn(ball(self.norm, self.eps), self.kind)


@ATTACKS.register("fgsm", paper="Goodfellow et al. 2015", needs=("gradients",))
@dataclass(frozen=True)
class FGSM(Attack):
    """Fast gradient sign method: one sign step of length ``eps``.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        adapt: to a defense.
    """

    eps: Fraction = 8 / 255
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """One step, and its result even if the start is better, as published."""
        stage = Stage(Misclassify() + self.adapt.evasion(system), 1, SignStep(self.eps))
        return Search(Linf(self.eps), (stage,), self.adapt.direction(), returns="last")


@ATTACKS.register("bim", paper="Kurakin et al. 2017", needs=("gradients",))
@dataclass(frozen=True)
class BIM(Attack):
    """Basic iterative method: sign steps from the image itself; returns the last iterate, as published.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        steps: iterations.
        step_size: of one step.
        adapt: to a defense.
    """

    eps: Fraction = 8 / 255
    steps: Count = 10
    step_size: Positive = 1 / 255
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """Sign descent on the cross-entropy."""
        stage = Stage(Misclassify() + self.adapt.evasion(system), self.steps, SignStep(self.step_size))
        return Search(Linf(self.eps), (stage,), self.adapt.direction(), returns="last")


@ATTACKS.register("mi-fgsm", paper="Dong et al. 2018, Algorithm 1", needs=("gradients",))
@dataclass(frozen=True)
class MIFGSM(Attack):
    """Momentum iterative FGSM: sign steps along an accumulated, L1-normalised gradient; returns the last iterate.

    Args:
        eps: radius of the ball.
        steps: ``T``.
        step_size: ``alpha``; the paper uses ``eps / T``.
        decay: ``mu``.
        norm: ``linf`` (sign steps) or ``l2`` (steps of that length along the momentum).
        adapt: to a defense.
    """

    eps: Radius = 8 / 255
    steps: Count = 10
    step_size: Positive = 0.8 / 255
    decay: NonNegative = 1.0
    norm: Norm = "linf"
    adapt: Adaptation = field(default_factory=Adaptation)

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def plan(self, system: System) -> Plan:
        """Momentum on the cross-entropy."""
        update = MomentumStep(self.step_size, self.decay, sign=self.norm == "linf")
        stage = Stage(Misclassify() + self.adapt.evasion(system), self.steps, update)
        return Search(ball(self.norm, self.eps), (stage,), self.adapt.direction(), returns="last")


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
        restarts: number of runs, of which the best counts.
        early_stop: stop a sample at its first success.
        adapt: to a defense.
    """

    eps: Radius = 8 / 255
    steps: Count = 40
    step_size: Positive = 1 / 255
    norm: Norm = "linf"
    random_start: bool = False
    restarts: Count = 1
    early_stop: bool = False
    adapt: Adaptation = field(default_factory=Adaptation)

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def plan(self, system: System) -> Plan:
        """Descent on the cross-entropy (and a detector's score)."""
        return self.search(Misclassify() + self.adapt.evasion(system))

    def search(self, objective: Objective) -> Search:
        """The same search with another objective."""
        return Search(
            ball(self.norm, self.eps),
            (Stage(objective, self.steps, step(self.norm, self.step_size)),),
            self.adapt.direction(),
            random_start=self.random_start,
            restarts=self.restarts,
            early_stop=self.early_stop,
        )
