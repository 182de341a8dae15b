"""Objectives on detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..autograd.rectifiers import unswapped
from ..door import answer
from ..errors import InputError
from ..fields import Fraction, NonNegative
from ..maps import positive
from ..registry import OBJECTIVES
from ..transforms import Median, Transform
from .base import Goal, Objective, Observation
from .confident import lost, nats

if TYPE_CHECKING:
    from ..system import Detector


@OBJECTIVES.register("evade-detector", paper="Carlini and Wagner 2017 (adaptive attacks)", needs=("detector",))
@dataclass(frozen=True)
class EvadeDetector(Objective):
    """Hinge on the detector's differentiable score: zero once it is ``margin`` below ``threshold``.

    With ``watch``, the alarm itself decides: where it rings, the score is pushed down however low it is, and only
    where it does not, the constraint is met. A soft score that is no faithful surrogate then misleads nobody.

    Args:
        threshold: the soft score that clean inputs exceed as rarely as the detector's false-alarm rate allows.
        margin: how far below the threshold.
        watch: the detector whose alarm decides; ``None``: the soft score does.
    """

    threshold: float = 0.0
    margin: NonNegative = 0.1
    watch: Any = field(default=None, repr=False, compare=False)

    needs: ClassVar[frozenset[str]] = frozenset({"score"})

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``max(score - threshold + margin, 0)``; at least 1 where the watched alarm rings."""
        hinge = positive(self._score(seen) - self.threshold + self.margin)
        if self.watch is None:
            return hinge
        score = self._score(seen)
        return torch.where(self._rings(seen), torch.maximum(hinge, score - score.detach() + 1), hinge)

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """No alarm; without ``watch``, the score is below the threshold."""
        return self._score(seen) < self.threshold if self.watch is None else ~self._rings(seen)

    def _rings(self, seen: Observation) -> Tensor:
        """``[B]`` bool, computed once an observation."""
        key = "rings", self.watch
        if key not in seen.noted:
            # Of a system whose randomness was drawn again, that draw's.
            own = None if seen.system is None else seen.system.detector
            detector: Any = own if type(own) is type(self.watch) else self.watch
            # By the network that is deployed, whatever surrogate a direction has in its place.
            with torch.no_grad(), unswapped():
                # As in a system: a score that is NaN rings.
                seen.noted[key] = ~(detector.score(seen.x.detach()) <= self.watch.threshold)
        found: Tensor = seen.noted[key]
        return found

    @staticmethod
    def _score(seen: Observation) -> Tensor:
        if seen.score is None:
            raise InputError("EvadeDetector needs a system with a detector")
        return seen.score


def evade(detector: Detector, weight: float) -> Objective:
    """The objective of evading a detector: its own ``evasion``, or the hinge on its score."""
    evasion: Callable[[float], Objective] | None = getattr(detector, "evasion", None)
    return weight * hinge_on(detector) if evasion is None else evasion(weight)


def hinge_on(detector: Detector) -> EvadeDetector:
    """The hinge on a detector's soft score, below its threshold by 0.1, and by no more than a tenth of the way to the
    middle of the clean scores: of scores that are small numbers, none would be 0.1 below."""
    threshold, known = detector.soft_threshold, getattr(detector, "soft_scores", None)
    most = EvadeDetector.margin
    if isinstance(known, Tensor) and len(known):
        way = threshold - float(known.median())
        most = min(most, way / 10) if way > 0 else most
    return EvadeDetector(threshold, most, watch=detector)


@OBJECTIVES.register("agree-squeezed", paper="Zhang et al. 2020, section 4 Q3 (l_sqz)", needs=("gradients",))
@dataclass(frozen=True)
class AgreeSqueezed(Objective):
    """Cross-entropy between the predictions on the input and on its squeezed versions, summed over squeezers.

    Args:
        squeezers: those of the detector; rounding has the identity as its derivative.
    """

    squeezers: tuple[Transform, ...] = field(default_factory=lambda: (Median(3),))

    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``-sum_k f_k(x) log f_k(psi(x))``, nats; at least the entropy of ``f(x)``."""
        p = seen.logits.softmax(1)
        return sum_over((p * nats(-squeezed_logits(seen, s).log_softmax(1))).sum(1) for s in self.squeezers)


@OBJECTIVES.register("evade-squeezing", paper="Zhang et al. 2020, section 4 Q3 (reference code)", needs=("gradients",))
@dataclass(frozen=True)
class EvadeSqueezing(Objective):
    """Hinge on the L1 distance of the probabilities on the input and on each of its squeezed versions.

    Zero while the distance is below ``share`` of the threshold; met where no distance exceeds the threshold.

    Args:
        squeezers: those of the detector; rounding has the identity as its derivative.
        weights: of each squeezer's hinge; with weight 0 it counts for ``met`` only.
        threshold: L1 distance of probabilities above which there is an alarm, at most 2.
        share: of the threshold below which the loss is 0.
    """

    squeezers: tuple[Transform, ...] = field(default_factory=lambda: (Median(3),))
    weights: tuple[float, ...] = (1.0,)
    threshold: NonNegative = 1.0
    share: Fraction = 0.75

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``sum_i w_i max(||f(x) - f(psi_i(x))||_1 - share threshold, 0)``."""
        weighted = [(w, s) for w, s in zip(self.weights, self.squeezers, strict=True) if w]
        least = self.share * self.threshold
        hinges = (w * positive(_distance(seen, s) + _way_back(seen, s) - least) for w, s in weighted)
        return sum_over(hinges) if weighted else seen.logits.new_zeros(len(seen.logits))

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """No distance exceeds the threshold."""
        with torch.no_grad():
            return torch.stack([_distance(seen, s) <= self.threshold for s in self.squeezers]).all(0)


@OBJECTIVES.register("match-probabilities", paper="Zhang et al. 2020, Algorithm 2", needs=("gradients",))
@dataclass(frozen=True)
class MatchProbabilities(Objective):
    """L1 distance of the probabilities to those that the goal wants (``goal.wanted``).

    Args:
        slack: the distance up to which the loss is 0 (the paper: 0).
    """

    slack: NonNegative = 0.0

    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``max(||f(x) - f(x_+)||_1 - slack, 0)``."""
        if goal.wanted is None:
            raise InputError("MatchProbabilities needs the wanted probabilities: give the goal wanted, [B, K]")
        distance = (seen.logits.softmax(1) - goal.wanted).abs().sum(1)
        return positive(distance + lost(seen.logits, goal.wanted.argmax(1)) - self.slack)


def squeezed_logits(seen: Observation, squeezer: Transform) -> Tensor:
    """``[B, K]`` of the squeezed inputs, computed once an observation."""
    if seen.system is None:
        raise InputError("squeezed inputs need the system: set the observation's system")
    known: Tensor | None = seen.noted.get(squeezer)
    if known is None or (torch.is_grad_enabled() and not known.requires_grad):
        known = seen.noted[squeezer] = answer(seen.system.model, squeezer.straight(seen.x))
    return known


def sum_over(values: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape, of which there is at least one."""
    return torch.stack(list(values)).sum(0)


def _distance(seen: Observation, squeezer: Transform) -> Tensor:
    return (seen.logits.softmax(1) - squeezed_logits(seen, squeezer).softmax(1)).abs().sum(1)


def _way_back(seen: Observation, squeezer: Transform) -> Tensor:
    """Where the two predictions differ and both round to certainty, the distance of probabilities has no gradient."""
    return lost(squeezed_logits(seen, squeezer), seen.logits.detach().argmax(1))
