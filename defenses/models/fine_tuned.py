"""Base class of the trainings that fine-tune a pretrained classifier."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustexplain.attacks import Attack
from robustexplain.autograd.rectifiers import require_rectifiers
from robustexplain.autograd.second_derivatives import (
    named_derivatives,
    refuse_missing_derivatives,
    twice_differentiable,
)
from robustexplain.data import stack
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Positive, identified
from robustexplain.files import digest_tensors
from robustexplain.training import Samples, Session, Training, eval_mode, fit
from robustexplain.training.parts import resting

from .base import ModelDefense
from .input_gradients import classified, gradient, score
from .loss_module import HardeningLoss, LossModule, Smoothed

Norms = Literal["eval", "train"]
"""The mode of the network while it is trained."""


@dataclass(frozen=True)
class FineTuned(ModelDefense):
    """Fine-tunes the classifier by a loss of its own; a subclass gives the loss.

    What has a softplus while it is trained is deployed, validated and judged with its own rectifiers.

    Args:
        training: epochs, batch, optimiser; ``freeze`` names the parts that stay as they are.
        norms: ``eval``: batch norms keep the statistics of the pretrained network and dropout does not draw; ``train``:
            both as in a training from the start, with the statistics of all inputs that a step shows the network.
        softplus: ``beta`` of the softplus that replaces the network's rectifiers while it is trained, in inner attacks
            too; ``None`` keeps the rectifiers.
    """

    training: Training = field(default_factory=lambda: Training(epochs=3, lr=1e-4, weight_decay=0.0))
    norms: Norms = "eval"
    softplus: Positive | None = None

    twice: ClassVar[bool] = True
    """Whether its loss differentiates an input gradient."""

    @abstractmethod
    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        """The loss of ``network``, and ``x`` ``[1, ...]``, one of its inputs; refuses what it cannot train."""

    def _module(self, model: nn.Module, network: nn.Module, loss: HardeningLoss) -> LossModule:
        """What is trained and kept in checkpoints; a subclass may add what its loss remembers."""
        return LossModule(model, network)

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        return self._fine_tuned(model, data, session, digest_tensors(model.state_dict()))

    def _fine_tuned(self, model: nn.Module, data: Samples, session: Session, start: str) -> nn.Module:
        """The model trained in place; ``start`` is the digest of what it was."""
        x, y = (part.to(session.device) for part in stack(data, range(1)))
        if self.softplus is not None:
            require_rectifiers(model, x, f"the softplus of {self.name}")
        network = model if self.softplus is None else Smoothed(model, self.softplus)
        with eval_mode(network):
            refuse_untrainable(self, model, network, x, y)
            loss = self._loss(network, x)
        module = self._module(model, network, loss)
        fit(module, loss, data, self.training, name=self.name, seed=self.seed, session=session,
            identity=[identified(self), start], evaluating=self.norms == "eval")  # fmt: skip
        return model


def refuse_untrainable(defense: FineTuned, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> None:
    """Refuse a network of which nothing is trained, or whose input gradients cannot be differentiated.

    Raises:
        InputError: every part is frozen.
        UnsupportedModelError: an operation without a second derivative.
    """
    trained = weights_in_training(defense.name, model, defense.training)
    if defense.twice:
        refuse_once_differentiable(network, trained, x, y)


def refuse_once_differentiable(network: nn.Module, trained: list[nn.Parameter], x: Tensor, y: Tensor) -> None:
    """Refuse a network whose input gradients cannot be differentiated in its weights.

    Raises:
        UnsupportedModelError: an operation without a second derivative.
    """
    with torch.enable_grad(), named_derivatives(), twice_differentiable():
        given, logits = classified(network, x)
        found = gradient(score(logits, y, "cross_entropy"), given)
        refuse_missing_derivatives(found)
        torch.autograd.grad(found.square().sum() + logits.sum(), trained, allow_unused=True)


def weights_in_training(name: str, model: nn.Module, training: Training) -> list[nn.Parameter]:
    """The weights that a training of that name changes.

    Raises:
        InputError: every part is frozen.
    """
    still = {id(p) for part in resting(model, training) for p in part.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in still]
    if not trained:
        raise InputError(
            f"{name} has nothing to train: training.freeze names every part of this {type(model).__name__} that has "
            "weights"
        )
    return trained


def refuse_no_room(defense: ModelDefense, attack: Attack, name: str) -> None:
    """Refuse an inner attack that may change nothing.

    Raises:
        FieldError: its ``eps`` is 0.
    """
    if getattr(attack, "eps", None) == 0:
        raise FieldError(type(defense).__name__, f"{name}.eps", "must be above 0: no other input is learned from")
