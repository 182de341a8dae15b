"""Robust attribution training: attributions move little over the ball (RAR, and the distances of FAR and IGR)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import maximised
from robustexplain.door import answer
from robustexplain.fields import Count, NonNegative
from robustexplain.maps import expand
from robustexplain.registry import DEFENSES
from robustexplain.training import TrainingStep, eval_mode, frozen

from .distances import dissimilarity
from .fine_tuned import FineTuned, refuse_no_room
from .input_gradients import Of, classified, gradient, score
from .loss_module import HardeningLoss

Distance = Literal["path", "pearson", "cosine"]
"""``path``: the L1 norm of the attribution from ``x`` to ``x'``; else one minus the similarity of two attributions."""


@DEFENSES.register("rar", paper="Chen et al. 2019 (IG-NORM, IG-SUM-NORM); Ivankay et al. 2020; Wang and Kong 2022",
                   needs=("data",))  # fmt: skip
@dataclass(frozen=True)
class RobustAttribution(FineTuned):
    """Fine-tune the classifier so that integrated gradients move little within a ball.

    The loss of a sample is ``CE + weight * d(x, x')``, and ``x'`` maximises it over the ball. As published:

    - IG-NORM (Chen et al. 2019): ``CE(x) + weight * |IG(x -> x')|_1``, integrated gradients of the cross-entropy on
      the line from ``x`` to ``x'``; the defaults.
    - IG-SUM-NORM: the same with ``CE(x')``: ``adversarial``, ``weight`` 0.1.
    - FAR (Ivankay et al. 2020), AAT and (``adversarial``) AdvAAT: ``distance`` ``pearson``, ``1 - r`` of the
      attributions of ``x`` and of ``x'``.
    - IGR (Wang and Kong 2022): ``distance`` ``cosine``; their adversarial training is ``adversarial``.

    Without ``adversarial`` the inner attack maximises the distance alone, since ``CE(x)`` does not change.

    Departures: the inner attack returns its best iterate, not its last; it uses ``inner_points`` of the path that are
    evenly spaced (so does the code of Chen et al.: every fifth of 50). Attributions for ``pearson`` and ``cosine`` are
    integrated gradients of the label's logit from a black image, in every channel; neither paper has code for images,
    and FAR leaves the attribution open. Fine-tuning a trained network is ours: Chen et al. train from random weights,
    with Adam at 1e-4 for 100,000 steps of 50 images.

    A sum over the batch stands on both terms in the code of Chen et al., so that ``weight`` is theirs.

    Args:
        attack: radius and steps of the inner attack; by default Chen et al.'s for Fashion-MNIST. It starts at random:
            at ``x`` itself a distance has no gradient.
        weight: ``lambda``: 1 in IG-NORM, 0.1 in IG-SUM-NORM (Fashion-MNIST).
        adversarial: the cross-entropy of ``x'`` in place of that of ``x``.
        distance: what is measured between ``x`` and ``x'``.
        points: ``m``, of the sum that stands for the integral.
        inner_points: the same in the inner attack.
    """

    attack: PGD = field(default_factory=lambda: PGD(0.1, steps=20, step_size=0.01, random_start=True))
    weight: NonNegative = 1.0
    adversarial: bool = False
    distance: Distance = "path"
    points: Count = 50
    inner_points: Count = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_room(self, self.attack, "attack")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return AttributionLoss(network, self)


@dataclass(frozen=True)
class AttributionLoss(HardeningLoss):
    """``CE + weight * d(x, x')``.

    Args:
        settings: the defense.
    """

    settings: RobustAttribution

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """``x'`` ``[b, ...]``."""
        settings, known = self.settings, None
        if settings.distance != "path":
            with eval_mode(self.network), frozen(self.network):
                given, logits = classified(self.network, x)
                known = self._from_black(self.network, given, logits, y, settings.inner_points, False)

        def reached(network: nn.Module, moved: Tensor, logits: Tensor) -> Tensor:
            distance = self.distance(network, x, moved, logits, y, settings.inner_points, known)
            if not settings.adversarial:
                return distance
            return score(logits, y, "cross_entropy") + settings.weight * distance

        return (maximised(settings.attack, self.network, reached, x, y, step),)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss at ``x`` and ``x'``; ``points`` passes of an input, twice that for two attributions."""
        settings, (forged,) = self.settings, others
        moved, logits = classified(network, forged)
        if settings.distance == "path":
            known, benign = None, None if settings.adversarial else answer(network, x)
        else:
            given, benign = classified(network, x)
            known = self._from_black(network, given, benign, y, settings.points)
        distance = self.distance(network, x, moved, logits, y, settings.points, known)
        return self.task(logits if settings.adversarial or benign is None else benign, y) + settings.weight * distance

    def distance(
        self, network: nn.Module, x: Tensor, moved: Tensor, logits: Tensor, y: Tensor, points: int, known: Tensor | None
    ) -> Tensor:
        """``d(x, moved)`` ``[b]``; ``known`` is the attribution of ``x``, where there are two."""
        if self.settings.distance == "path":
            inner = path_gradient(network, x, moved, logits, y, points, "cross_entropy")
            return ((moved - x) * inner).abs().flatten(1).sum(1)
        assert known is not None  # for the type checker
        similarity = self.settings.distance
        return dissimilarity(known, self._from_black(network, moved, logits, y, points), similarity)

    @staticmethod
    def _from_black(
        network: nn.Module, x: Tensor, logits: Tensor, y: Tensor, points: int, graph: bool = True
    ) -> Tensor:
        found = path_gradient(network, torch.zeros_like(x), x, logits, y, points, "label", graph)
        return x * found if graph else (x * found).detach()


def path_gradient(
    network: nn.Module, start: Tensor, end: Tensor, logits: Tensor, y: Tensor, points: int, of: Of, graph: bool = True
) -> Tensor:
    """Mean gradient at ``start + k / points (end - start)``, ``k = 1..points``, the shape of ``end``.

    One forward and one backward pass of each point but the last, which is ``end``: its ``logits`` are known.
    """
    total = gradient(score(logits, y, of), end, graph)
    if points > 1:
        shares = expand(torch.arange(1, points).to(end) / points, end[None])
        between = (start + shares * (end - start)).flatten(0, 1)
        found = gradient(score(answer(network, between), y.repeat(points - 1), of), between, graph)
        total = total + found.unflatten(0, (points - 1, len(end))).sum(0)
    return total / points
