"""Objectives on the prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..fields import Fraction, NonNegative
from ..maps import positive
from ..registry import OBJECTIVES
from .base import Goal, Objective, Observation, Weight, at
from .confident import away, lifted, lost, nats, toward


@OBJECTIVES.register("misclassify", paper="Madry et al. 2018; Zhang et al. 2020, section 3.6 (label smoothing)")
@dataclass(frozen=True)
class Misclassify(Objective):
    """Cross-entropy towards ``goal_class`` (targeted), or away from ``label`` (untargeted).

    Args:
        confidence: met only where the goal's probability (untargeted: one minus the label's) reaches this.
        smoothing: ``rho``: the goal's target probability is drawn from ``U(1 - rho, 1)`` at each step (Zhang et al.,
            section 3.6), which keeps the gradient from vanishing on over-confident predictions; may be a schedule.

    Examples:
        >>> import torch
        >>> from robustexplain.objectives import Goal, Misclassify, Observation
        >>> x, logits = torch.rand(1, 1, 32, 32), torch.zeros(1, 10)
        >>> Misclassify().loss(Observation(x, logits), Goal(x, torch.tensor([3]), goal_class=torch.tensor([7])))
        tensor([2.3026])
    """

    confidence: Fraction = 0.0
    smoothing: Weight = 0.0

    least: ClassVar[float] = -torch.inf

    @property
    def settled(self) -> bool:
        """Unless a target probability is drawn."""
        return self.smoothing == 0

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """Cross-entropy, nats; where a probability rounds to 0 or 1, a loss on the log odds that keeps a direction."""
        if goal.goal_class is None:
            return away(goal.scaled(seen.logits), goal.label)
        rho = at(self.smoothing, seen.progress)
        if rho == 0 or seen.streams is None:
            return toward(goal.scaled(seen.logits), goal.goal_class)
        log_p = -nats(-goal.scaled(seen.logits).log_softmax(1))
        goal_log_p = log_p.gather(1, goal.goal_class[:, None])[:, 0]
        wanted = 1 - rho * seen.streams.uniform(goal_log_p)
        rest = (log_p.sum(1) - goal_log_p) / (log_p.shape[1] - 1)
        return -(wanted * goal_log_p + (1 - wanted) * rest)

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """Predicted as wanted, with at least ``confidence``."""
        return self.unmet(seen, goal) == 0

    def unmet(self, seen: Observation, goal: Goal) -> Tensor:
        """0 where met, 1 where predicted as wanted below ``confidence``, 2 where predicted otherwise."""
        marked, predicted = goal.label if goal.goal_class is None else goal.goal_class, seen.logits.argmax(1)
        otherwise = predicted == marked if goal.goal_class is None else predicted != marked
        # NaN is no prediction.
        otherwise = 2 * (otherwise | seen.logits.isnan().any(1)).float()
        if self.confidence == 0:
            return otherwise
        p = seen.logits.softmax(1).gather(1, marked[:, None])[:, 0]
        confidence = 1 - p if goal.goal_class is None else p
        return torch.where(otherwise > 0, otherwise, (confidence < self.confidence).float())


@OBJECTIVES.register("distill", paper="Hinton et al. 2015, at temperature 1")
@dataclass(frozen=True)
class Distill(Objective):
    """Cross-entropy towards the probabilities that the goal wants (``goal.wanted``), such as another model's."""

    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``-sum_k p_k log q_k``, nats; least where the two agree, at the entropy of ``p``."""
        if goal.wanted is None:
            raise InputError("Distill needs the wanted probabilities: give the goal wanted, [B, K]")
        return (goal.wanted * nats(-seen.logits.log_softmax(1))).sum(1)


@OBJECTIVES.register("keep-prediction", paper="Ghorbani et al. 2019; Dombrowski et al. 2019, manipulation method")
@dataclass(frozen=True)
class KeepPrediction(Objective):
    """Squared distance of the probabilities to the benign ones; met while ``label`` is still predicted.

    The distance is summed over classes; Dombrowski et al. average it: their ``1e6`` at 1000 classes is 1e3 here.

    Args:
        tolerance: met only where the label's probability moved by no more than this; with 1 only the label counts.
    """

    tolerance: Fraction = 1.0

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``||p(x') - p(x)||^2``; where the benign class's probability is lost to rounding, more: a way back to it."""
        logits, benign = goal.scaled(seen.logits), goal.scaled(self._logits(goal)).softmax(1)
        return (logits.softmax(1) - benign).square().sum(1) + lost(logits, benign.argmax(1))

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """The label is predicted, with about the benign confidence."""
        same = (seen.logits.argmax(1) == goal.label) & ~seen.logits.isnan().any(1)
        if self.tolerance >= 1:
            return same
        moved = seen.logits.softmax(1) - self._logits(goal).softmax(1)
        return same & (moved.gather(1, goal.label[:, None])[:, 0].abs() <= self.tolerance)

    @staticmethod
    def _logits(goal: Goal) -> Tensor:
        if goal.benign_logits is None:
            raise InputError("KeepPrediction needs the benign logits: give the goal benign_logits")
        return goal.benign_logits


@OBJECTIVES.register("margin", paper="Carlini and Wagner 2017, section V (f6)")
@dataclass(frozen=True)
class Margin(Objective):
    """Logit margin ``max(rival - wanted, -kappa)``: zero gradient once the wanted class leads by ``kappa``.

    Targeted, the goal class is wanted and the best other class is the rival; untargeted, the label is the rival and
    the best other class is wanted.

    Args:
        kappa: by how much the wanted class should lead, in logits.
    """

    kappa: NonNegative = 0.0

    least: ClassVar[float] = -torch.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``max(rival - wanted, -kappa)``, in logits (times the goal's scale, if it has one)."""
        loss = positive(margin(seen.logits, goal) + self.kappa) - self.kappa
        return loss if goal.scale is None else goal.scale * loss

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """The wanted class leads, by ``kappa`` or more."""
        lead = -margin(seen.logits, goal)
        return (lead > 0) & (lead >= self.kappa)


@OBJECTIVES.register("lead", paper="Carlini and Wagner 2017, section V (f6), as a constraint with slack")
@dataclass(frozen=True)
class Lead(Objective):
    """``max(rival - wanted + slack, 0)``: :class:`Margin`, but met as soon as the wanted class leads at all.

    Unlike :class:`KeepPrediction` it leaves the probabilities free as long as the prediction stays. Leads count in
    logits of the usual size, of which half a one is a small step: times the goal's scale, if it has one, else where a
    benign input's logits differ by less than 5, as if they differed by as much.

    Args:
        slack: in such logits, the lead from which on the loss is zero.
        keep: the wanted class is ``goal.label``, instead of the adversary's.
    """

    slack: NonNegative = 0.5
    keep: bool = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """The hinge, in logits of the usual size."""
        return positive(self._margin(seen, goal) + self.slack)

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """The wanted class leads."""
        return self._margin(seen, goal) < 0

    def unmet(self, seen: Observation, goal: Goal) -> Tensor:
        """0 where met, else one more than the tenths of such a logit that are missing."""
        margin = self._margin(seen, goal)
        return torch.where(margin < 0, 0, 1 + (10 * margin).floor()).float()

    def _margin(self, seen: Observation, goal: Goal) -> Tensor:
        found = margin(seen.logits, replace(goal, goal_class=goal.label) if self.keep else goal)
        # The slack is not scaled: of tiny logits no lead would reach it, of huge ones none would be asked for.
        scale = torch.ones_like(found) if goal.scale is None else goal.scale
        small = 1 if goal.benign_logits is None else lifted(goal.benign_logits)
        return found * torch.where(scale == 1, small, scale)


def margin(logits: Tensor, goal: Goal) -> Tensor:
    """``[B]``: the rival's logit minus that of the wanted class; negative where the adversary has won."""
    marked = goal.label if goal.goal_class is None else goal.goal_class
    own = logits.gather(1, marked[:, None])[:, 0]
    other = logits.masked_fill(F.one_hot(marked, logits.shape[1]).bool(), -torch.inf).amax(1)
    return own - other if goal.goal_class is None else other - own


@OBJECTIVES.register("distance", paper="Carlini and Wagner 2017, section V")
@dataclass(frozen=True)
class Distance(Objective):
    """Squared L2 distance of the attacked input to the benign one, summed over pixels of ``[0, 1]`` images."""

    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``||x' - x||_2^2``."""
        return (seen.x - goal.x).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Traded(Objective):
    """Another objective, times the constant ``goal.trade`` that a search over constants sets for each sample."""

    of: Objective = Margin()

    least: ClassVar[float] = -torch.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``trade * loss``."""
        if goal.trade is None:
            raise InputError("Traded needs a goal with trade, one constant a sample")
        return goal.trade * self.of.loss(seen, goal)

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """Where the other is."""
        return self.of.met(seen, goal)
