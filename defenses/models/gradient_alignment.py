"""AGA: the gradient at an input and that at its neighbour are aligned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robustexplain.errors import FieldError
from robustexplain.fields import NonNegative, Positive, Radius
from robustexplain.maps import expand
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.training import Training, TrainingStep

from .distances import cosine
from .fine_tuned import FineTuned
from .input_gradients import classified, gradient, score
from .loss_module import HardeningLoss

Neighbour = Literal["uniform", "gaussian", "gradient", "sign"]
"""Noise in the box, normal noise of deviation ``eps``, or a step along the gradient or along its sign."""


@DEFENSES.register("aga", paper="Joo et al. 2023", needs=("data",))
@dataclass(frozen=True)
class GradientAlignment(FineTuned):
    """Fine-tune the classifier so that its gradient at an input and at a neighbour agree in direction and size.

    The loss of a sample is ``CE(x) + l2 * |g - g_r|^2 + cosine * (1 - cos(g, g_r)) / 2``, with ``g`` the gradient of
    the label's logit at ``x`` and ``g_r`` at the neighbour ``x + z`` (Joo et al. 2023; their code). A step takes two
    forward passes of an input and a double backward.

    Departures: ``x + z`` is clipped to ``[0, 1]``; the code clips nothing in training (to the values of a batch in the
    noise of its test). The code deploys the network with its softplus; ours is deployed with its rectifiers. Gradients
    are those of pixels in ``[0, 1]``: of an input that the paper standardises by ``s`` they are ``1 / s`` times theirs,
    and its ``l2`` is ``s^2`` times as much here (about 1/25 on photographs); the cosine is the same. Steps along the
    gradient are as long as those along its sign, ``eps`` times the root of the number of pixels; the code's have the
    length ``eps``.

    Args:
        training: the paper's from random weights: 200 epochs, AdamW of 1e-3 (ResNet-18, CIFAR-10).
        softplus: as in :class:`FineTuned`; the paper's networks have a softplus of 3.
        l2: ``lambda_2``; 0.01 for CIFAR-10, 1 for ImageNet-100.
        cosine: ``lambda_cos``; 1 for LeNet and 0.1 for ResNet-18 on CIFAR-10, 0.01 for ImageNet-100.
        eps: size of ``z``, in the units of ``[0, 1]`` pixels.
        neighbour: which ``z``; the last two are one step of an inner attack.
        detach: ``g`` is a constant: the neighbour's gradient moves towards it. It saves the double backward at ``x``.
    """

    training: Training = field(default_factory=lambda: Training(epochs=3, lr=1e-4, weight_decay=1e-2))
    softplus: Positive | None = 3.0
    l2: NonNegative = 0.01
    cosine: NonNegative = 0.1
    eps: Radius = 4 / 255
    neighbour: Neighbour = "uniform"
    detach: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps == 0:
            raise FieldError(type(self).__name__, "eps", "must be above 0: an input is no neighbour of itself")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return AlignmentLoss(network, self)


@dataclass(frozen=True)
class AlignmentLoss(HardeningLoss):
    """``CE(x) + l2 * |g - g_r|^2 + cosine * (1 - cos(g, g_r)) / 2``.

    Args:
        settings: the defense.
    """

    settings: GradientAlignment

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """The noise ``[b, ...]`` of a neighbour that is drawn."""
        streams, eps = Streams.of(x, step.seed, step.epoch, "neighbour"), self.settings.eps
        if self.settings.neighbour == "uniform":
            return (streams.uniform(x, -eps, eps),)
        return (eps * streams.normal(x),) if self.settings.neighbour == "gaussian" else ()

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss."""
        settings = self.settings
        given, logits = classified(network, x)
        own = gradient(score(logits, y, "label"), given, graph=not settings.detach)
        moved = (x + (others[0] if others else self._along(own.detach()))).clamp(0, 1)
        near, near_logits = classified(network, moved)
        other = gradient(score(near_logits, y, "label"), near)
        apart = (own - other).square().flatten(1).sum(1)
        turned = (1 - cosine(own.flatten(1), other.flatten(1))) / 2
        return self.task(logits, y) + settings.l2 * apart + settings.cosine * turned

    def _along(self, own: Tensor) -> Tensor:
        if self.settings.neighbour == "sign":
            return self.settings.eps * own.sign()
        # By its largest entry first: the squares of tiny gradients underflow.
        own = own / expand(own.flatten(1).abs().amax(1).clamp(min=torch.finfo(own.dtype).tiny), own)
        length = expand(own.flatten(1).square().mean(1).sqrt(), own)
        return torch.where(length > 0, self.settings.eps * own / torch.where(length > 0, length, 1), 0)
