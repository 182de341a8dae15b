"""What the trainings on the inputs of an attack share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from typing_extensions import Self

from robustexplain.attacks import Attack
from robustexplain.attacks.inner import attacked
from robustexplain.fields import identified
from robustexplain.training import Samples, Session, Training, TrainingStep, fit
from robustexplain.training.losses import right

from .base import ModelDefense, begun
from .fine_tuned import refuse_no_room


@dataclass(frozen=True)
class TrainedOnAttacks(ModelDefense):
    """Fine-tunes the classifier in train mode by a loss on attacked inputs; a subclass gives loss and default attack.

    Args:
        attack: the inner attack, computed at each step against the current weights, in eval mode.
        training: epochs, batch, optimiser. With ``validation``, the epoch of the best robust accuracy is kept.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.

    Raises:
        FieldError: an ``eps`` of 0.
    """

    attack: Attack
    training: Training = field(default_factory=Training)
    fresh: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_room(self, self.attack, "attack")

    @abstractmethod
    def _loss(self, model: nn.Module) -> AttackedLoss:
        """The loss of the model in training."""

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        start = begun(model, self.fresh, self.seed)
        return fit(model, self._loss(model), data, self.training, name=self.name, seed=self.seed, session=session,
                   identity=[identified(self), start])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttackedLoss(ABC):
    """A loss ``[b]`` on attacked inputs.

    Args:
        attack: the inner attack.
        model: the network in training, unwrapped.
        label_smoothing: share of the label's probability that is distributed over all classes.
    """

    attack: Attack
    model: nn.Module
    label_smoothing: float = 0.0

    @abstractmethod
    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the model, perhaps wrapped for data-parallel training."""

    def smoothed(self, label_smoothing: float) -> Self:
        """The same loss with label smoothing."""
        return replace(self, label_smoothing=label_smoothing)

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy`` and, on the inner attack's inputs, ``robust_accuracy``."""
        return {"accuracy": right(module(x), y), "robust_accuracy": right(module(self.attacked(x, y, step)), y)}

    def attacked(self, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """The attack's inputs ``[b, C, H, W]`` against the model's current weights."""
        return attacked(self.attack, self.model, x, y, step)
