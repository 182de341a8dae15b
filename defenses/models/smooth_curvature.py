"""Weight decay, a smooth activation and a penalty on the Hessian: maps move with the curvature of a network."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.errors import UnsupportedModelError
from robustexplain.fields import Count, NonNegative, Positive
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.training import Training, TrainingStep

from .fine_tuned import FineTuned
from .input_gradients import Of, classified, gradient, score
from .loss_module import HardeningLoss


@DEFENSES.register("smooth-curvature", paper="Dombrowski et al. 2022; Joo et al. 2023 (the estimate)", needs=("data",))
@dataclass(frozen=True)
class SmoothCurvature(FineTuned):
    """Fine-tune the classifier towards a small Hessian in its input.

    The three ingredients of Dombrowski et al. 2022 are weight decay (``training.weight_decay``), a smooth activation
    (``softplus``), and ``weight * |H|_F^2`` in the loss, with ``H`` the Hessian of the label's logit in the input;
    ``retrained`` has the first two without the third. The norm is estimated as in the code of Joo et al. 2023: ``E |H
    v|^2`` over ``v ~ N(0, I)``. A step takes one forward pass, and derivatives of third order: each draw costs about
    two passes more, forth and back.

    The paper has no code: the weight is that of Joo et al. for ResNet-18 on CIFAR-10, for a standardised input. For one
    that is divided by ``s`` within the model the Hessian of pixels is ``1 / s^2`` times theirs.

    Departure: the paper and the code deploy the network with its softplus; ours has one while it is trained and is
    deployed with its rectifiers.

    Args:
        weight: of the squared norm.
        draws: of ``v`` for each input.
        score: whose Hessian.
        softplus: as in :class:`FineTuned`. The Hessian of a logit of rectifiers is zero, and cannot be made smaller.

    Raises:
        UnsupportedModelError: a Hessian that is zero everywhere.
    """

    training: Training = field(default_factory=lambda: Training(epochs=3, lr=1e-4, weight_decay=1e-2))
    softplus: Positive | None = 3.0
    weight: NonNegative = 1e-4
    draws: Count = 1
    score: Of = "label"

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        loss = CurvatureLoss(network, self)
        probe = Streams.of(x, 0, "curvature").normal(x)
        if not bool(loss.curvature(network, x, x.new_zeros(1).long(), (probe,)).any()):
            raise UnsupportedModelError(
                f"smooth-curvature makes the Hessian of {self.score} small, and that of this network is zero already, "
                "as that of rectifiers is: set softplus, or score to cross_entropy"
            )
        return loss


@dataclass(frozen=True)
class CurvatureLoss(HardeningLoss):
    """``CE(x) + weight * mean |H v|^2``.

    Args:
        settings: the defense.
    """

    settings: SmoothCurvature

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """``v`` ``[b, ...]`` of each draw."""
        streams = Streams.of(x, step.seed, step.epoch, "curvature")
        return tuple(streams.normal(x) for _ in range(self.settings.draws))

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss."""
        given, logits = classified(network, x)
        return self.task(logits, y) + self.settings.weight * self._curvature(given, logits, y, others)

    def curvature(self, network: nn.Module, x: Tensor, y: Tensor, directions: tuple[Tensor, ...]) -> Tensor:
        """Mean ``|H v|^2`` over the directions ``v``, ``[b]``."""
        return self._curvature(*classified(network, x), y, directions)

    def _curvature(self, given: Tensor, logits: Tensor, y: Tensor, directions: tuple[Tensor, ...]) -> Tensor:
        own = gradient(score(logits, y, self.settings.score), given)
        products = [torch.autograd.grad((own * v).sum(), given, create_graph=True, allow_unused=True)[0]
                    for v in directions]  # fmt: skip
        # There is none where the gradient does not depend on the input: the network is linear.
        none = torch.zeros_like(given)
        squares = torch.stack([none if product is None else product.square() for product in products])
        return squares.flatten(2).sum(2).mean(0)
