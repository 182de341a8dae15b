"""TRADES: accuracy on clean inputs, traded against answers that do not move within a ball."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from robustexplain.answers import with_auxiliary
from robustexplain.attacks.inner import attacked
from robustexplain.fields import NonNegative
from robustexplain.files import digest_tensors
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, TrainingStep, fit
from robustexplain.training.losses import classification_loss, right

from .base import ModelDefense, draw_fresh_weights
from .distances import divergence
from .fine_tuned import refuse_no_room
from .inner_attacks import Divergence


@DEFENSES.register("trades", paper="Zhang et al. 2019, eq. 5", needs=("data",))
@dataclass(frozen=True)
class TRADES(ModelDefense):
    """Fine-tune the classifier on ``CE(f(x), y) + beta * max_{x'} KL(f(x) || f(x'))`` (Zhang et al. 2019, eq. 5).

    Both terms carry gradients to the weights, the divergence through both of its sides. The inner attack runs in eval
    mode. Departure: ``x`` and ``x'`` go through the network in one pass, so that in train mode batch norms see both
    together; the authors' code has three passes of their own, whose batch statistics differ.

    Args:
        beta: ``1 / lambda`` of the paper, which uses 1 and 6.
        attack: the inner attack; by default the authors' for CIFAR-10: 10 steps of 0.007 in a ball of 0.031, from
            Gaussian noise of 0.001.
        training: epochs, batch, optimiser. With ``validation``, the epoch of the best robust accuracy is kept.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.

    Raises:
        FieldError: an ``eps`` of 0.
    """

    beta: NonNegative = 6.0
    attack: Divergence = field(default_factory=Divergence)
    training: Training = field(default_factory=Training)
    fresh: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_room(self, self.attack, "attack")

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        start = digest_tensors(model.state_dict())
        if self.fresh:
            draw_fresh_weights(model, self.seed)
        loss = TradesLoss(self.attack, self.beta, model)
        return fit(model, loss, data, self.training, name="trades", seed=self.seed, session=session,
                   identity=[asdict(self), start])  # fmt: skip


@dataclass(frozen=True)
class TradesLoss:
    """``CE(f(x), y) + beta * KL(f(x) || f(x'))`` of each sample, ``[b]``.

    Args:
        attack: gives ``x'``.
        beta: of the divergence.
        model: the network in training, unwrapped.
        label_smoothing: share of the label's probability that is distributed over all classes.
    """

    attack: Divergence
    beta: float
    model: nn.Module
    label_smoothing: float = 0.0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the model, perhaps wrapped for data-parallel training."""
        found = module(torch.cat([x, self.attacked(x, y, step)]))
        task = classification_loss(found, torch.cat([y, y]), self.label_smoothing)[: len(x)]
        return task + self.beta * divergence(*with_auxiliary(found)[0].chunk(2))

    def smoothed(self, label_smoothing: float) -> TradesLoss:
        """The same loss with label smoothing."""
        return replace(self, label_smoothing=label_smoothing)

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy`` and, on the inner attack's inputs, ``robust_accuracy``."""
        return {"accuracy": right(module(x), y), "robust_accuracy": right(module(self.attacked(x, y, step)), y)}

    def attacked(self, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """Inputs ``[b, C, H, W]`` whose answers differ most from those of ``x``."""
        return attacked(self.attack, self.model, x, y, step)
