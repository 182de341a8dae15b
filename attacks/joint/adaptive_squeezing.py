"""Adaptive ADV2 against feature squeezing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Count, Eps, Fraction, Natural, NonNegative, Positive
from robustexplain.objectives import (
    AgreeSqueezed,
    EvadeSqueezing,
    Goal,
    MatchProbabilities,
    Misclassify,
    Objective,
    Sum,
)
from robustexplain.objectives.evasion import evade
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.system import System, draws
from robustexplain.transforms import BitDepth, Squeezing, Transform, transforms

from ..adaptive import Adaptation
from ..base import Attack
from ..search.loop import Plan, Search, SearchResult, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import SignStep
from ..threat import Linf, Threat
from .adv2 import ADV2


@dataclass(frozen=True)
class SqueezedBox(Threat):
    """The squeezed images between the squeezed ends of the L-infinity ball around ``x`` (Zhang et al., Algorithm 2).

    They may lie slightly outside of that ball, because of the rounding.

    Args:
        eps: radius of the ball, in the units of ``[0, 1]`` pixels.
        bits: per channel.
    """

    eps: Eps = 8 / 255
    bits: Count = 3

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """The squeezed image, or with ``streams`` a random squeezed one."""
        return self.project(x, x if streams is None else self.sample(x, streams))

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """The nearest squeezed image of the box."""
        squeeze = BitDepth(self.bits).forward
        low, high = squeeze((x - self.eps).clamp(0, 1)), squeeze((x + self.eps).clamp(0, 1))
        return torch.min(torch.max(squeeze(variable), low), high)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """A random image of the ball, not squeezed yet."""
        return x + streams.uniform(x, -self.eps, self.eps)


@dataclass(frozen=True)
class _TwoStageSearch(Plan):
    """Search for ``x_+`` among squeezed images, then for ``x_*`` in the ball that is classified like it.

    Args:
        threat: the ball.
        first: the search for ``x_+``; ``None`` where no squeezer rounds.
        second: the search for ``x_*``.
        squeezed_queries: squeezed inputs evaluated for each input of the joint stage.
        draws: of the second search's directions.
    """

    threat: Threat
    first: Search | None
    second: Search
    squeezed_queries: int
    draws: int = 1

    @property
    def aim(self) -> Objective:
        return self.second.aim

    @property
    def summary(self) -> str:
        return self.second.summary + (", after a search among squeezed images" if self.first else "")

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        queries: int | Tensor = 0
        if self.first is not None:
            squeezed = self.first.run(system, goal, streams)
            with torch.no_grad():
                goal = _towards(goal, answer(system.model, squeezed.x))
            queries = squeezed.queries + 1
        found = self.second.run(system, goal, streams)
        each = self.draws if draws(system.model) else 1
        joint = found.queries - each * self.second.stages[0].steps * self.second.restarts
        return replace(found, queries=queries + found.queries + self.squeezed_queries * joint)


def _towards(goal: Goal, logits: Tensor) -> Goal:
    """The goal with the probabilities of ``x_+``; the default goal class is its likeliest one but the label."""
    p = logits.softmax(1)
    rival = p.scatter(1, goal.label[:, None], -1.0).argmax(1)
    wanted = rival if goal.goal_class is None else goal.goal_class
    # Where x_+ is not classified as wanted, full confidence in the wanted class replaces its probabilities.
    one_hot = torch.zeros_like(p).scatter(1, wanted[:, None], 1.0)
    return replace(goal, goal_class=wanted, wanted=torch.where((p.argmax(1) == wanted)[:, None], p, one_hot))


@ATTACKS.register(
    "adaptive-squeezing",
    paper="Zhang et al. 2020, section 4 Q3, Algorithm 2",
    needs=("gradients", "differentiable maps"),
)
@dataclass(frozen=True)
class AdaptiveSqueezing(Attack):
    """ADV2 that evades feature squeezing: adds a loss for the agreement of predictions before and after squeezing.

    For squeezers that smooth, the paper adds ``l_sqz = H(f(x), f(psi(x)))`` (``penalty="agree"``); the reference code
    adds hinges on ``||f(x) - f(psi(x))||_1`` that are zero below three quarters of the detector's threshold
    (``"hinge"``). For bit depth, PGD first looks for an adversarial ``x_+`` among the images of that depth whose pixels
    lie between the squeezed ends of the ball, in steps of one level; the loss then has ``||f(x) - f(x_+)||_1``, in the
    hinge form only where it exceeds the same share of the threshold. Without a goal class, the class of ``x_+`` is
    used, as in the code.

    Squeezers and thresholds are those of the system's feature-squeezing detectors; the fields are used if the system
    has no detector. Other detectors, beside them or alone, are evaded too, with weight ``evade``. Departures: the
    returned iterate is the best (nearest map among those that are misclassified with ``confidence`` and raise no
    alarm), not the last; so is ``x_+``; an ``x_+`` that is not classified as wanted is replaced by full confidence in
    the goal class, or without one in its likeliest class but the label; several bit depths share the ``x_+`` of the
    coarsest; all hinges have weight ``evade``, where the code's two medians have 9 and 3.

    Args:
        eps: L-infinity radius, in the units of ``[0, 1]`` pixels.
        steps: iterations in the ball, warm start included (the code: 1200, none of them warm).
        step_size: of one iteration.
        squeezers: names of the assumed detector's squeezers, if the system has no detector.
        threshold: L1 distance above which the assumed detector raises an alarm, if the system has no detector.
        penalty: ``agree`` (the paper's cross-entropy) or ``hinge`` (the code's).
        agree: weight of ``l_sqz``, summed over squeezers.
        evade: weight of each hinge.
        match: weight of ``||f(x) - f(x_+)||_1`` (the code: 40).
        rounding: against bit depth: ``two-stage`` as published; ``straight``, like a smoothing squeezer, with
            straight-through gradients (Athalye et al. 2018); or ``both``.
        squeezed_steps: iterations of the search for ``x_+`` (the code: 400).
        weight: ``lambda`` of the map, as in ADV2.
        growth: ``lambda`` at the end over ``lambda`` at the start.
        warm_start: share of ``steps`` spent on the prediction alone.
        confidence: ``kappa``: iterates below it count only if none reaches it.
        encoder_weight: of the encoder's cross-entropy for model-guided interpreters.
        surrogate: replaces the rectifiers while gradients are computed: ``auto`` is ADV2's ``h(z)``, which does not
            change the predictions that must agree, for gradient maps and none otherwise.
        restarts: number of runs, of which the best counts; all but the first begin at random.
        adapt: to rounding and randomness; its ``evade`` stays 0, because the penalties are the detector's terms.
    """

    eps: Eps = 0.031
    steps: Count = 1200
    step_size: Positive = 1 / 255
    squeezers: Sequence[str] = ("bit-depth-3", "median-2", "median-3")
    threshold: NonNegative = 1.0
    penalty: Literal["agree", "hinge"] = "agree"
    agree: NonNegative = 1.0
    evade: NonNegative = 12.0
    match: NonNegative = 40.0
    rounding: Literal["two-stage", "straight", "both"] = "both"
    squeezed_steps: Natural = 400
    weight: NonNegative = 10.0
    growth: Positive = 2.0
    warm_start: Fraction = 0.25
    confidence: Fraction = 0.8
    encoder_weight: NonNegative = 0.1
    surrogate: Surrogate = "auto"
    restarts: Count = 1
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "squeezers", tuple(self.squeezers))
        transforms(self.squeezers)
        if self.adapt.evade:
            problem = f"must be 0: the penalties evade the detector, with weight evade; got {self.adapt.evade!r}"
            raise FieldError("AdaptiveSqueezing", "adapt.evade", problem)

    def _changes(self, system: System) -> dict[str, Any]:
        return {"adapt": replace(self.adapt.to(system), evade=0.0)}

    @property
    def adaptation(self) -> str:
        """The adaptations in use; the detector is always in the loss."""
        return replace(self.adapt, evade=self.evade or 1.0).words

    def plan(self, system: System) -> Plan:
        """The search for ``x_+``, if a squeezer rounds; then ADV2's, with the penalties."""
        known = self._squeezers(system)
        used = tuple(squeezer for squeezers, _ in known for squeezer in squeezers)
        warm = round(self.steps * self.warm_start)
        update = SignStep(self.step_size)
        joint = ADV2(
            weight=self.weight, growth=self.growth, confidence=self.confidence, encoder_weight=self.encoder_weight
        ).objective(system)
        total = joint + self._others(system)
        for squeezers, threshold in known:
            total = total + self._penalties(squeezers, threshold)
        if self._first(used) is not None:
            rounding = (t for squeezers, t in known if any(isinstance(s, BitDepth) for s in squeezers))
            total = total + self.match * MatchProbabilities(0.75 * min(rounding) if self.penalty == "hinge" else 0.0)
        second = Search(
            Linf(self.eps),
            (Stage(Misclassify(), warm, update), Stage(total, self.steps - warm, update)),
            self.adapt.direction(surrogate_for(system.interpreter, self.surrogate)),
            restarts=self.restarts,
        )
        return _TwoStageSearch(Linf(self.eps), self._first(used), second, len(used), self.adapt.draws)

    def _squeezers(self, system: System) -> tuple[tuple[tuple[Transform, ...], float], ...]:
        """The squeezers of each detector that squeezes, and its threshold."""
        # Several detectors on one system say at which threshold each raises the joint alarm.
        several = getattr(system.detector, "at_joint_alarm", None)
        detectors = (system.detector,) if several is None else several()
        known = tuple((d.squeezers, d.threshold) for d in detectors if isinstance(d, Squeezing))
        assumed = ((transforms(self.squeezers), self.threshold),)
        return known if known or system.detector is not None else assumed

    def _others(self, system: System) -> Objective:
        """The terms of evading the detectors that do not squeeze."""
        if system.detector is None or isinstance(system.detector, Squeezing):
            return Sum()
        terms = evade(system.detector, self.evade).terms()
        return Sum(tuple((w, part) for w, part in terms if not isinstance(part, (AgreeSqueezed, EvadeSqueezing))))

    def _first(self, used: tuple[Transform, ...]) -> Search | None:
        depths = [s for s in used if isinstance(s, BitDepth)]
        if not depths or self.rounding == "straight":
            return None
        coarsest = min(depths, key=lambda s: s.bits)
        stage = Stage(Misclassify(), self.squeezed_steps, SignStep(coarsest.step))
        return Search(SqueezedBox(self.eps, coarsest.bits), (stage,), self.adapt.direction())

    def _penalties(self, used: tuple[Transform, ...], threshold: float) -> Objective:
        # x_+ stands for bit depth alone: other rounding squeezers have no other gradient than straight-through.
        with_gradient = [not isinstance(s, BitDepth) or self.rounding != "two-stage" for s in used]
        hinge = self.penalty == "hinge"
        weights = tuple(self.evade if usable and hinge else 0.0 for usable in with_gradient)
        total: Objective = EvadeSqueezing(used, weights, threshold)
        agreeing = tuple(s for s, usable in zip(used, with_gradient, strict=True) if usable)
        if agreeing and not hinge:
            total = total + self.agree * AgreeSqueezed(agreeing)
        return total
