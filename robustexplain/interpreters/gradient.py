"""Interpreters that differentiate the prediction with respect to the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..registry import INTERPRETERS
from .base import Explanation, Interpreter, explained_class, pick


@INTERPRETERS.register("gradient", paper="Simonyan et al. 2013; GRAD of Zhang et al. 2020, eq. 5")
@dataclass(frozen=True, eq=False)
class Gradient(Interpreter):
    """Gradient saliency: ``m = |d f_c(x) / d x|`` (Zhang et al. 2020, eq. 5).

    On a network of rectifiers the map's own derivative comes only from the softmax (zero for ``of="logit"``), so an
    attack on it follows a surrogate (:mod:`robustexplain.activations`).

    Args:
        of: what is differentiated: ``probability`` (eq. 5), ``logit`` (Ghorbani et al.) or ``log_probability`` (the
            loss, as in the code of Zhang et al.; after rescaling the same map as ``probability``).
        channels: how channels become one map: largest magnitude (Zhang et al.), sum of magnitudes (Dombrowski et al.,
            Ghorbani et al.), or signed sum.
    """

    of: Literal["probability", "logit", "log_probability"] = "probability"
    channels: Literal["max", "abs_sum", "sum"] = "max"

    second_order: ClassVar[bool] = True

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = x if x.requires_grad else x.detach().requires_grad_()
        logits = self.model(x)
        target = explained_class(logits, target)
        (gradient,) = torch.autograd.grad(self._output(logits, target).sum(), x, create_graph=graph)
        if self.of == "probability":
            # grad p = p grad log p; through log-softmax the gradient survives a probability that rounds to one.
            gradient = gradient * pick(logits.softmax(1), target)[:, None, None, None]
        return Explanation(logits, self._reduce(gradient))

    def _output(self, logits: Tensor, target: Tensor) -> Tensor:
        return pick(logits if self.of == "logit" else logits.log_softmax(1), target)

    def _reduce(self, gradient: Tensor) -> Tensor:
        if self.channels == "sum":
            return gradient.sum(1)
        return gradient.abs().sum(1) if self.channels == "abs_sum" else gradient.abs().amax(1)
