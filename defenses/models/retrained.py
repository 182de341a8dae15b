"""The control of every training: the same network, trained again by cross-entropy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, TrainingStep
from robustexplain.training.losses import classification_loss

from .base import begun
from .fine_tuned import FineTuned, Norms
from .loss_module import HardeningLoss


@DEFENSES.register("retrained", paper="a control; Mehrpanah et al. 2026", needs=("data",))
@dataclass(frozen=True)
class Retrained(FineTuned):
    """Train the classifier by cross-entropy alone: a control that every other training must beat.

    With a training's own settings, ``norms`` and ``softplus`` among them, it shows what longer training does by itself.
    With ``fresh``, larger steps and smaller batches (``training: {lr: 3e-2, batch_size: 16}``) it is the implicit
    regularisation of ordinary stochastic gradient descent, which is said to steady maps for free (Mehrpanah et al.
    2026, abstract).

    Args:
        training: epochs, batch, optimiser.
        norms: ``train`` by default, as in the trainings for predictions; those for maps have ``eval``.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.
    """

    training: Training = field(default_factory=Training)
    norms: Norms = "train"
    fresh: bool = False

    twice: ClassVar[bool] = False

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        start = begun(model, self.fresh, self.seed)
        return self._fine_tuned(model, data, session, start)

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return PlainLoss(network)


@dataclass(frozen=True)
class PlainLoss(HardeningLoss):
    """The cross-entropy of each sample; auxiliary heads are trained, too."""

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """As the class says."""
        return classification_loss(network(x), y, self.label_smoothing)
