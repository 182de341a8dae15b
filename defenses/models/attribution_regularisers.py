"""Attribution regularisers: the true class's attribution concentrated, and its change held where it matters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import maximised
from robustexplain.door import answer
from robustexplain.fields import Count, NonNegative
from robustexplain.interpreters.base import pick
from robustexplain.maps import expand
from robustexplain.registry import DEFENSES
from robustexplain.training import TrainingStep

from .attribution import path_gradient
from .fine_tuned import FineTuned, refuse_no_room
from .input_gradients import classified, gradient, runner_up, score
from .loss_module import HardeningLoss


@DEFENSES.register("attribution-regularisers", paper="Sarkar, Sarkar & Balasubramanian 2021, eq. 7-9, and code",
                   needs=("data",))  # fmt: skip
@dataclass(frozen=True)
class AttributionRegularisers(FineTuned):
    """Fine-tune the classifier by CE and two regularisers of attributions, at attacked inputs (Sarkar et al. 2021).

    The loss of a sample is ``CE(x') + weight * (CACR + WACR)``. Contrastive: ``CACR = KL(U || q_wrong) - KL(U ||
    q_true)``, with ``q`` the softmax over pixels of integrated gradients from black to ``x'`` of a class's probability,
    and ``U`` uniform: concentrated for the label, flat for the strongest other class. Weighted: with ``a`` the
    attribution from black to ``x`` and ``d`` that from ``x`` to ``x'``, ``WACR = sum a d`` where their signs agree,
    plus ``sum |d|`` where they do not. ``x'`` maximises ``CE(x') + weight * |d|_1``, not the outer regularisers.

    The code (Flower alone) sums over the batch, terms and cross-entropy, so that ``weight`` is its. ``d`` is of minus
    the cross-entropy, as there. Departure: the inner attack returns its best iterate, not its last.

    Args:
        attack: radius and steps of the inner attack, by default those for Flower. It starts at random.
        weight: ``lambda``: 0.08 in the paper, 0.1 in the code's configuration.
        points: ``m``, of each of the sums that stand for integrals; 20 in the code's configuration, 5 in its attack.
        inner_points: the same in the inner attack.
    """

    attack: PGD = field(default_factory=lambda: PGD(8 / 255, steps=7, step_size=2 / 255, random_start=True))
    weight: NonNegative = 0.08
    points: Count = 5
    inner_points: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_room(self, self.attack, "attack")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return RegularisedLoss(network, self)


@dataclass(frozen=True)
class RegularisedLoss(HardeningLoss):
    """``CE(x') + weight * (CACR + WACR)`` of each sample.

    Args:
        settings: the defense.
    """

    settings: AttributionRegularisers

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """``x'`` ``[b, ...]``."""

        def reached(network: nn.Module, moved: Tensor, logits: Tensor) -> Tensor:
            change = self.change(network, x, moved, logits, y, self.settings.inner_points)
            return score(logits, y, "cross_entropy") + self.settings.weight * change.abs().flatten(1).sum(1)

        return (maximised(self.settings.attack, self.network, reached, x, y, step),)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """Four integrals of ``points`` points each, two of them in the same forward passes."""
        points = self.settings.points
        moved, logits = classified(network, *others)
        true, wrong = class_attributions(network, others[0], y, points, both=True)
        contrast = from_uniform(wrong) - from_uniform(true)
        (base,) = class_attributions(network, x, y, points)
        weighted = weighted_change(base, self.change(network, x, moved, logits, y, points))
        return self.task(logits, y) + self.settings.weight * (contrast + weighted)

    @staticmethod
    def change(network: nn.Module, x: Tensor, moved: Tensor, logits: Tensor, y: Tensor, points: int) -> Tensor:
        """The attribution of minus the cross-entropy from ``x`` to ``moved``, the shape of ``x``."""
        return -(moved - x) * path_gradient(network, x, moved, logits, y, points, "cross_entropy")


def class_attributions(network: nn.Module, x: Tensor, y: Tensor, points: int, both: bool = False) -> tuple[Tensor, ...]:
    """Integrated gradients from black of the probability of ``y``, and of the strongest other class at each point.

    Args:
        network: answers with logits.
        x: ``[b, ...]``.
        y: ``[b]``.
        points: of each input, in one forward pass.
        both: whether the other class's is wanted too.
    """
    shares = expand(torch.arange(1, points + 1).to(x) / points, x[None])
    between = (shares * x).flatten(0, 1).detach().requires_grad_()
    logits, labels = answer(network, between), y.repeat(points)
    p = logits.softmax(1)
    found = []
    for classes in (labels, runner_up(logits, labels))[: 1 + both]:
        slope = gradient(pick(p, classes), between).unflatten(0, (points, len(x)))
        found.append(x * slope.mean(0))
    return tuple(found)


def from_uniform(attribution: Tensor) -> Tensor:
    """``KL(U || softmax of the attribution over pixels)``, ``[b]``; channels are summed."""
    flat = (attribution.sum(1) if attribution.dim() == 4 else attribution).flatten(1)
    return -flat.log_softmax(1).mean(1) - math.log(flat.shape[1])


def weighted_change(base: Tensor, change: Tensor) -> Tensor:
    """``sum base * change`` where their signs agree, plus ``sum |change|`` where they do not, ``[b]``."""
    terms = torch.where(base.sign() == change.sign(), base * change, change.abs())
    return terms.flatten(1).sum(1)
