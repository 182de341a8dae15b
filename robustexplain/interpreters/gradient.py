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
        score = pick(logits, target) if self.of == "logit" else margin(logits, target)
        (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=graph)
        if self.of != "logit":
            # p = sigmoid(margin), so grad p = p (1 - p) grad margin and grad log p = (1 - p) grad margin. With 1 - p
            # as sigmoid(-margin), the map stays exact where p rounds to one.
            scale = (-score).sigmoid() * (score.sigmoid() if self.of == "probability" else 1)
            gradient = gradient * scale[:, None, None, None]
        return Explanation(logits, self._reduce(gradient))

    def _reduce(self, gradient: Tensor) -> Tensor:
        if self.channels == "sum":
            return gradient.sum(1)
        return gradient.abs().sum(1) if self.channels == "abs_sum" else gradient.abs().amax(1)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """``z_c - log sum_{k != c} exp z_k``, ``[B]``: the log odds of class ``c``."""
    others = logits.scatter(1, target[:, None].long(), -torch.inf).logsumexp(1)
    return pick(logits, target) - others
