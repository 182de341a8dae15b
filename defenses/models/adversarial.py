"""Adversarial training: a classifier trained on inputs attacked against its current weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.fields import Fraction
from robustexplain.registry import DEFENSES
from robustexplain.training import TrainingStep
from robustexplain.training.losses import classification_loss

from .on_attacks import AttackedLoss, TrainedOnAttacks


@DEFENSES.register("pgd-at", paper="Madry et al. 2018, eq. 2.1", needs=("data",))
@dataclass(frozen=True)
class AdversarialTraining(TrainedOnAttacks):
    """Fine-tune the classifier on PGD's inputs, computed at each step against the current weights.

    The inner maximisation of eq. 2.1 runs in eval mode, with the batch norms' running statistics; the update runs
    in train mode, so that the statistics are those of the attacked inputs (with a ``clean_weight``, of both halves
    together). Departure: PGD returns its best iterate, the paper's its last.

    Args:
        attack: the PGD attack in training; by default the paper's for CIFAR-10 (section 5): 7 steps of 2/255 in a ball
            of 8/255.
        training: epochs, batch, optimiser. With ``validation``, the epoch of the best robust accuracy is kept.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.
        clean_weight: share of the clean inputs' loss; 0 trains on attacked inputs only, as in the paper.

    Raises:
        FieldError: an ``eps`` of 0.
    """

    attack: PGD = field(default_factory=lambda: PGD(8 / 255, steps=7, step_size=2 / 255, random_start=True))
    clean_weight: Fraction = 0.0

    def _loss(self, model: nn.Module) -> AttackedLoss:
        return AdversarialLoss(attack=self.attack, model=model, clean_weight=self.clean_weight)


@dataclass(frozen=True, kw_only=True)
class AdversarialLoss(AttackedLoss):
    """Cross-entropy of attacked inputs (and of clean ones), ``[b]``.

    Args:
        clean_weight: share of the clean inputs' loss.
    """

    clean_weight: float = 0.0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """As :meth:`AttackedLoss.__call__`."""
        moved = self.attacked(x, y, step)
        share = self.clean_weight
        if not share:
            return classification_loss(module(moved), y, self.label_smoothing)
        clean, forged = classification_loss(
            module(torch.cat([x, moved])), torch.cat([y, y]), self.label_smoothing
        ).chunk(2)
        return share * clean + (1 - share) * forged
