"""The control of every training: the same network, trained again by cross-entropy alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from torch import nn

from robustexplain.files import digest_tensors
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, cross_entropy, fit

from .base import ModelDefense, draw_fresh_weights


@DEFENSES.register("retrained", paper="a control; Mehrpanah et al. 2026", needs=("data",))
@dataclass(frozen=True)
class Retrained(ModelDefense):
    """Train the classifier by cross-entropy alone: a control that every other training must beat.

    With a training's own settings it shows what longer training does by itself. With ``fresh``, larger steps and
    smaller batches (``training: {lr: 3e-2, batch_size: 16}``) it is the implicit regularisation of ordinary
    stochastic gradient descent, which is said to steady maps for free (Mehrpanah et al. 2026, abstract).

    Args:
        training: epochs, batch, optimiser.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.
    """

    training: Training = field(default_factory=Training)
    fresh: bool = False

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        start = digest_tensors(model.state_dict())
        if self.fresh:
            draw_fresh_weights(model, self.seed)
        return fit(model, cross_entropy, data, self.training, name="retrained", seed=self.seed, session=session,
                   identity=[asdict(self), start])  # fmt: skip
