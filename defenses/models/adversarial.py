"""Adversarial training: a classifier trained on inputs attacked against its current weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import attacked
from robustexplain.fields import Fraction
from robustexplain.files import digest_tensors
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, TrainingStep, fit
from robustexplain.training.losses import classification_loss, right

from .base import ModelDefense, draw_fresh_weights
from .fine_tuned import refuse_no_room


@DEFENSES.register("pgd-at", paper="Madry et al. 2018, eq. 2.1", needs=("data",))
@dataclass(frozen=True)
class AdversarialTraining(ModelDefense):
    """Fine-tune the classifier on PGD's inputs, computed at each step against the current weights.

    The inner maximisation of eq. 2.1 runs in eval mode, with the batch norms' running statistics; the update runs
    in train mode, so that the statistics are those of the attacked inputs (with a ``clean_weight``, of both halves
    together). Departure: PGD returns its best iterate, the paper's its last.

    Args:
        attack: the PGD attack in training; by default the paper's for CIFAR-10 (section 5): 7 steps of 2/255 in a ball
            of 8/255.
        training: epochs, batch, optimiser. With ``validation``, the epoch of the best robust accuracy is kept.
        clean_weight: share of the clean inputs' loss; 0 trains on attacked inputs only, as in the paper.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.

    Raises:
        FieldError: an ``eps`` of 0.
    """

    attack: PGD = field(default_factory=lambda: PGD(8 / 255, steps=7, step_size=2 / 255, random_start=True))
    training: Training = field(default_factory=Training)
    clean_weight: Fraction = 0.0
    fresh: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_room(self, self.attack, "attack")

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        # Before fresh weights are drawn, whose last bits differ between kinds of machine; their seed is known.
        start = digest_tensors(model.state_dict())
        if self.fresh:
            draw_fresh_weights(model, self.seed)
        loss = AdversarialLoss(self.attack, self.clean_weight, model)
        return fit(model, loss, data, self.training, name="pgd-at", seed=self.seed, session=session,
                   identity=[asdict(self), start])  # fmt: skip


@dataclass(frozen=True)
class AdversarialLoss:
    """Cross-entropy of attacked inputs (and of clean ones), ``[b]``.

    Args:
        attack: the attack in training.
        clean_weight: share of the clean inputs' loss.
        model: the network in training, unwrapped.
        label_smoothing: share of the label's probability that is distributed over all classes.
    """

    attack: PGD
    clean_weight: float
    model: nn.Module
    label_smoothing: float = 0.0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the model, perhaps wrapped for data-parallel training."""
        moved = self.attacked(x, y, step)
        share = self.clean_weight
        if not share:
            return classification_loss(module(moved), y, self.label_smoothing)
        clean, forged = classification_loss(
            module(torch.cat([x, moved])), torch.cat([y, y]), self.label_smoothing
        ).chunk(2)
        return share * clean + (1 - share) * forged

    def smoothed(self, label_smoothing: float) -> AdversarialLoss:
        """The same loss with label smoothing."""
        return replace(self, label_smoothing=label_smoothing)

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy`` and, on attacked inputs, ``robust_accuracy``."""
        return {"accuracy": right(module(x), y), "robust_accuracy": right(module(self.attacked(x, y, step)), y)}

    def attacked(self, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """PGD's inputs ``[b, C, H, W]`` against the model's current weights."""
        return attacked(self.attack, self.model, x, y, step)
