"""TRADES: accuracy on clean inputs, traded against answers that do not move within a ball."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.answers import with_auxiliary
from robustexplain.fields import NonNegative
from robustexplain.registry import DEFENSES
from robustexplain.training import TrainingStep
from robustexplain.training.losses import classification_loss

from .distances import divergence
from .inner_attacks import Divergence
from .on_attacks import AttackedLoss, TrainedOnAttacks


@DEFENSES.register("trades", paper="Zhang et al. 2019, eq. 5", needs=("data",))
@dataclass(frozen=True)
class TRADES(TrainedOnAttacks):
    """Fine-tune the classifier on ``CE(f(x), y) + beta * max_{x'} KL(f(x) || f(x'))`` (Zhang et al. 2019, eq. 5).

    Both terms carry gradients to the weights, the divergence through both of its sides. The inner attack runs in eval
    mode. Departure: ``x`` and ``x'`` go through the network in one pass, so that in train mode batch norms see both
    together; the authors' code has three passes of their own, whose batch statistics differ.

    Args:
        attack: the inner attack; by default the authors' for CIFAR-10: 10 steps of 0.007 in a ball of 0.031, from
            Gaussian noise of 0.001.
        training: epochs, batch, optimiser. With ``validation``, the epoch of the best robust accuracy is kept.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.
        beta: ``1 / lambda`` of the paper, which uses 1 and 6.

    Raises:
        FieldError: an ``eps`` of 0.
    """

    attack: Divergence = field(default_factory=Divergence)
    beta: NonNegative = 6.0

    def _loss(self, model: nn.Module) -> AttackedLoss:
        return TradesLoss(attack=self.attack, model=model, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class TradesLoss(AttackedLoss):
    """``CE(f(x), y) + beta * KL(f(x) || f(x'))`` of each sample, ``[b]``.

    Args:
        beta: of the divergence.
    """

    beta: float

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """As :meth:`AttackedLoss.__call__`."""
        found = module(torch.cat([x, self.attacked(x, y, step)]))
        task = classification_loss(found, torch.cat([y, y]), self.label_smoothing)[: len(x)]
        return task + self.beta * divergence(*with_auxiliary(found)[0].chunk(2))
