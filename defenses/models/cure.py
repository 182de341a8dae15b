"""CURE: a small change of the loss's gradient along its own sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustexplain.errors import FieldError
from robustexplain.fields import NonNegative, Positive
from robustexplain.registry import DEFENSES
from robustexplain.training import TrainingStep, eval_mode, frozen

from .fine_tuned import FineTuned
from .input_gradients import along_sign, classified, gradient, score
from .loss_module import HardeningLoss


@DEFENSES.register("cure", paper="Moosavi-Dezfooli et al. 2019, section 4", needs=("data",))
@dataclass(frozen=True)
class CURE(FineTuned):
    """Fine-tune the classifier on ``CE(x) + weight * |g(x + h z) - g(x)|^2``: curvature regularisation.

    ``g`` is the gradient of the cross-entropy in the input, ``z = sign g(x) / |sign g(x)|_2`` (Moosavi-Dezfooli et al.
    2019, section 4): by finite differences the curvature of the loss along the direction that attacks take. ``z`` is
    held fixed in the update. A step takes one forward and backward pass for ``z``, and one of two inputs that is
    differentiated twice. ``x + h z`` may leave ``[0, 1]``.

    The authors' code works on inputs that are standardised (by about 0.2); the defaults are its ``h`` of 0.1, 0.4, 0.8,
    1.8, 3 in pixels of ``[0, 1]``, and its weight of 4 times 0.2 squared. Departures: the norm is squared, as in the
    paper, and gradients are those of a sample's own loss. The code's 4 multiplies a norm that is not squared, of the
    gradient of a batch's mean loss, so that 0.16 does not correspond to its strength. AdamW at the rate of the code.

    Args:
        weight: ``gamma``, of the squared change.
        h: lengths (L2, all pixels) of the step along ``z``: of the first epochs in their order, the last one for all
            others.

    Raises:
        FieldError: no length.
    """

    weight: NonNegative = 0.16
    h: tuple[Positive, ...] = (0.02, 0.08, 0.16, 0.36, 0.6)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "h", tuple(self.h))
        if not self.h or not all(length > 0 for length in self.h):
            raise FieldError(type(self).__name__, "h", f"must hold lengths above 0, one at least, got {self.h!r}")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return CurvatureChange(network, self)


@dataclass(frozen=True)
class CurvatureChange(HardeningLoss):
    """``CE(x) + weight * |g(x + h z) - g(x)|^2``.

    Args:
        settings: the defense.
    """

    settings: CURE

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """``x + h z`` ``[b, ...]``."""
        with eval_mode(self.network), frozen(self.network), torch.enable_grad():
            given, logits = classified(self.network, x)
            z = along_sign(gradient(score(logits, y, "cross_entropy"), given, graph=False))
        return (x + self.settings.h[min(step.epoch, len(self.settings.h) - 1)] * z,)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss, from one pass of ``x`` and ``x + h z``."""
        both, logits = classified(network, torch.cat([x, others[0]]))
        here, there = gradient(score(logits, torch.cat([y, y]), "cross_entropy"), both).chunk(2)
        change = (there - here).flatten(1).square().sum(1)
        return self.task(logits[: len(x)], y) + self.settings.weight * change
