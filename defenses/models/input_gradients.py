"""Gradients of a network's scores to its input, with a graph, for losses on maps."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.door import answer
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters.base import pick

Of = Literal["cross_entropy", "label", "runner_up"]
"""What is differentiated: the cross-entropy of the label, its logit, or the largest logit of another class."""


def classified(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs that autograd follows, equal to ``x``, and their logits ``[B, K]``; one forward pass."""
    x = x.detach().requires_grad_()
    return x, answer(network, x)


def score(logits: Tensor, y: Tensor, of: Of) -> Tensor:
    """``[B]``: what is differentiated.

    For any other class, such as a random one, take :func:`robustexplain.interpreters.base.pick`.
    """
    if of == "cross_entropy":
        return F.cross_entropy(logits, y, reduction="none")
    return pick(logits, y if of == "label" else runner_up(logits, y))


def runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """``[B]``: the class of the largest logit besides that of ``y``."""
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


def along_sign(found: Tensor) -> Tensor:
    """The sign of a gradient at length one, like ``found``, without a graph; 0 where the gradient is zero."""
    return F.normalize(found.detach().sign().flatten(1)).view_as(found)


def gradient(scores: Tensor, x: Tensor, graph: bool = True) -> Tensor:
    """``d scores_i / d x_i`` of each sample, the shape of ``x``; one backward pass.

    Args:
        scores: ``[B]``, of ``x``; each sample's depends on that sample alone.
        x: what autograd follows.
        graph: whether the gradient is differentiated again; without it the graph of the scores is kept all the same.
    """
    (found,) = torch.autograd.grad(scores.sum(), x, create_graph=graph, retain_graph=True, allow_unused=True)
    if found is None:
        raise UnsupportedModelError("the logits of this network do not depend on its input: it has no gradient")
    return found
