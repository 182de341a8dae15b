"""R2ET: a margin between the pixels that a map ranks at the top and the next ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, NonNegative, Positive
from robustexplain.registry import DEFENSES
from robustexplain.training import Training, TrainingStep

from .fine_tuned import FineTuned
from .input_gradients import along_sign, classified, gradient, score
from .loss_module import HardeningLoss

LEAST = 1e-30
"""Below that a change of the gradient counts as none."""


@DEFENSES.register(
    "r2et", paper="Chen et al. 2024, Training for Stable Explanation for Free, and code", needs=("data",)
)
@dataclass(frozen=True)
class RankThickness(FineTuned):
    """Fine-tune the classifier so that the pixels on top of its gradient map stay there.

    The loss of a sample is ``CE + w1 * |(g(x + h s) - g(x)) / h| + w2 * sum of (m_below - m_above)``, with ``g`` the
    gradient of the cross-entropy, ``s`` its sign at length one, and ``m`` the map: ``|g|`` summed over channels. The
    sum is over the pairs of the ``k``-th pixel with every other one of the first ``2 k``, as in the authors' code;
    all but the ends cancel, and what is left is the next ``k`` pixels' sum less that of the first ``k``.

    With ``adaptive`` weights, as in the code, ``w = |weight * (CE + 1) / term|`` for each term: it then counts
    ``weight * (CE + 1)``, whatever its scale. A step takes two forward passes and two double backwards.

    Departures: the code deploys the network with the softplus (``sp0.5``, a ``beta`` of 0.5) for good; ours has one
    while it is trained and is deployed with its rectifiers, so that ``softplus`` is 10: one of 0.5 makes a pretrained
    network of rectifiers another one, whose answers are near chance. Gradients are those of a sample's own loss (the
    code's are those of the batch's mean, and its norm is that of the whole batch); ``s`` has length one and ``h`` is
    0.01, where the code moves each pixel of CIFAR-10 by 3e-7, which float32 rounds away. Fine-tuning is the paper's:
    Adam at 1e-5, 10 epochs.

    Args:
        training: ten epochs at 1e-5.
        softplus: as in :class:`FineTuned`; the code's is 0.5.
        k: pixels on top.
        ranks: ``w2``, or its share with ``adaptive``; the code tries 0.001 to 100.
        curvature: ``w1``, the same.
        h: length of the step for the finite difference.
        adaptive: weights in proportion to the sample's cross-entropy.

    Raises:
        InputError: fewer than ``2 k`` pixels.
    """

    training: Training = field(default_factory=lambda: Training(epochs=10, lr=1e-5, weight_decay=0.0))
    softplus: Positive | None = 10.0
    k: Count = 100
    ranks: NonNegative = 0.1
    curvature: NonNegative = 0.1
    h: Positive = 1e-2
    adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks and not self.curvature:
            raise FieldError(type(self).__name__, "ranks", "must be above 0, or curvature must be")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        pixels = x[0].numel() // (x.shape[1] if x.dim() == 4 else 1)
        if 2 * self.k > pixels:
            raise InputError(f"r2et ranks the first 2 k = {2 * self.k} pixels, and an input has {pixels}: lower k")
        return ThicknessLoss(network, self)


@dataclass(frozen=True)
class ThicknessLoss(HardeningLoss):
    """``CE + w1 * curvature + w2 * ranks``.

    Args:
        settings: the defense.
    """

    settings: RankThickness

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss."""
        settings = self.settings
        given, logits = classified(network, x)
        entropy = score(logits, y, "cross_entropy")
        own = gradient(entropy, given)
        loss = self.task(logits, y)
        if settings.ranks:
            loss = loss + self._weighted(settings.ranks, entropy, overtaking(own, settings.k))
        if settings.curvature:
            near, near_logits = classified(network, x + settings.h * along_sign(own))
            moved = (gradient(score(near_logits, y, "cross_entropy"), near) - own) / settings.h
            loss = loss + self._weighted(settings.curvature, entropy, size(moved))
        return loss

    def _weighted(self, weight: float, entropy: Tensor, term: Tensor) -> Tensor:
        if not self.settings.adaptive:
            return weight * term
        known = term.detach()
        scale = torch.where(known == 0, 0, (entropy.detach() + 1) / torch.where(known == 0, 1, known).abs())
        return weight * scale * term


def overtaking(gradients: Tensor, k: int) -> Tensor:
    """``[b]``: what the pixels after the first ``k`` have, less what those have; at most 0."""
    maps = gradients.abs().sum(1) if gradients.dim() == 4 else gradients.abs()
    first = maps.flatten(1).topk(2 * k, 1).values
    return first[:, k:].sum(1) - first[:, :k].sum(1)


def size(values: Tensor) -> Tensor:
    """The L2 norm of each sample, ``[b]``; 0 has a gradient of zero."""
    rows = values.flatten(1)
    # Squares of what a confident network leaves of its gradients underflow, and the root of that has no slope.
    largest = rows.detach().abs().amax(1)
    there = largest > LEAST
    unit = rows / torch.where(there, largest, 1)[:, None]
    squares = torch.where(there, unit.square().sum(1), 1)
    return torch.where(there, largest * squares.sqrt(), 0)
