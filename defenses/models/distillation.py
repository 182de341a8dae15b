"""Defensive distillation: a classifier trained at a high temperature and deployed at one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.answers import with_auxiliary
from robustexplain.autograd.layers import logit_layer, submodule
from robustexplain.data import stack
from robustexplain.door import answer
from robustexplain.fields import Positive, identified
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, TrainingStep, eval_mode, fit
from robustexplain.training.losses import right

from .base import ModelDefense, begun


@DEFENSES.register("distillation", paper="Papernot et al. 2016, section IV", needs=("data",))
@dataclass(frozen=True)
class DefensiveDistillation(ModelDefense):
    """Train a teacher at temperature ``T``, and the classifier on its probabilities at ``T``; deploy it at 1.

    This is a control for attackers, not a defense: logits grow with ``T``, so that the gradient of the cross-entropy
    vanishes in rounding and attacks along it fail, while the decision boundary is about where it was (Carlini and
    Wagner 2017). An attack on logits, or on a rescaled loss, succeeds as before.

    Departures: unless ``fresh``, teacher and classifier begin with the system's weights, the last layer's times ``T``,
    so that their probabilities at ``T`` are those that the system had; the teacher's probabilities are computed at each
    step, so that augmented inputs have their own.

    Args:
        temperature: ``T``; the paper tries 1 to 100, Ross and Doshi-Velez 2018 take 50.
        training: epochs, batch, optimiser, of both trainings.
        fresh: begin with random weights, as in the paper; for models that ``robustexplain.models`` builds.

    Raises:
        FieldError: a temperature of 0.
        UnsupportedModelError: a model without a linear layer that gives the logits, which is not trained afresh.
    """

    temperature: Positive = 50.0
    training: Training = field(default_factory=Training)
    fresh: bool = False

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        known = [identified(self), begun(model, self.fresh, self.seed)]
        if not self.fresh:
            self._heat(model, stack(data, range(1))[0].to(session.device))
        teacher = copy.deepcopy(model)
        fit(teacher, Tempered(self.temperature), data, self.training, name="distillation-teacher", seed=self.seed,
            session=session, identity=known)  # fmt: skip
        teacher.requires_grad_(False)
        return fit(model, Tempered(self.temperature, teacher), data, self.training, name="distillation",
                   seed=self.seed, session=session, identity=known)  # fmt: skip

    @torch.no_grad()
    def _heat(self, model: nn.Module, x: Tensor) -> None:
        """Multiply the logits by the temperature, in the layer that gives them."""
        with eval_mode(model):
            layer = submodule(model, logit_layer(model, x))
        for parameter in layer.parameters(recurse=False):
            parameter.mul_(self.temperature)


@dataclass(frozen=True)
class Tempered:
    """Cross-entropy ``[b]`` of ``softmax(logits / T)``, towards the labels or a teacher's ``softmax(logits / T)``.

    Args:
        temperature: ``T``.
        teacher: whose probabilities are wanted; ``None``: the labels.
        label_smoothing: share of the wanted probabilities that is distributed over all classes.
    """

    temperature: float
    teacher: nn.Module | None = None
    label_smoothing: float = 0.0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the model, perhaps wrapped for data-parallel training."""
        logits = with_auxiliary(module(x))[0]
        wanted = F.one_hot(y, logits.shape[1]).to(logits.dtype) if self.teacher is None else self._soft(x)
        smooth = (1 - self.label_smoothing) * wanted + self.label_smoothing / logits.shape[1]
        losses: Tensor = -(smooth * (logits / self.temperature).log_softmax(1)).sum(1)
        return losses

    def smoothed(self, label_smoothing: float) -> Tempered:
        """The same loss with label smoothing."""
        return replace(self, label_smoothing=label_smoothing)

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy``: 1 where the answer is right."""
        return {"accuracy": right(module(x), y)}

    def _soft(self, x: Tensor) -> Tensor:
        assert self.teacher is not None  # for the type checker
        with torch.no_grad(), eval_mode(self.teacher):
            return (answer(self.teacher, x) / self.temperature).softmax(1)
