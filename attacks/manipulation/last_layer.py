"""The last linear layer of a classifier, trained to convergence on fixed features: softmax regression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.autograd import layers
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters.influence.hessian import conjugate_gradients, features

ITERATIONS, TOLERANCE = 500, 1e-6
"""Of the solves with the curvature."""


class LastLayer:
    """The linear layer that gives a model's logits, with its weights (and bias, as one more column) as one matrix.

    Args:
        model: in eval mode; its last layer is changed by :meth:`put`.
        x: ``[B, ...]``, any inputs; the first is used to find the layer.

    Raises:
        UnsupportedModelError: no linear layer gives the logits, or it reads something else than ``[B, D]``.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        found = layers.submodule(model, layers.logit_layer(model, x))
        assert isinstance(found, nn.Linear)  # found by that; for the type checker
        self.layer = found
        if (shape := self.features(x[:1]).shape) != (1, found.in_features + (found.bias is not None)):
            raise UnsupportedModelError(f"the last layer must read features [B, D], got {list(shape)} and a bias")

    def features(self, x: Tensor) -> Tensor:
        """What the layer reads of ``x``, in float64 and with a column of ones if it has a bias: ``[B, D]``."""
        read = features(self.model, self.layer, x).double()
        return read if self.layer.bias is None else torch.cat([read, read.new_ones(len(read), 1)], 1)

    @property
    def weights(self) -> Tensor:
        """``[K, D]`` float64."""
        parts = [self.layer.weight, *([] if self.layer.bias is None else [self.layer.bias[:, None]])]
        return torch.cat([part.detach().double() for part in parts], 1)

    @torch.no_grad()
    def put(self, weights: Tensor) -> None:
        """Give the layer these weights ``[K, D]``."""
        width = self.layer.in_features
        self.layer.weight.copy_(weights[:, :width])
        if self.layer.bias is not None:
            self.layer.bias.copy_(weights[:, width])

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient of a loss in the weights, ``[K, D]`` float64; the layer requires gradients."""
        kept = [self.layer.weight, *([] if self.layer.bias is None else [self.layer.bias])]
        found = torch.autograd.grad(loss, kept, allow_unused=True, materialize_grads=True)
        return torch.cat([g.double().view(len(self.layer.weight), -1) for g in found], 1)


def fitted(read: Tensor, y: Tensor, decay: float, start: Tensor) -> Tensor:
    """The minimum of the mean cross-entropy plus ``decay / 2 |W|^2``, from ``start`` on, by L-BFGS.

    Args:
        read: features ``[N, D]`` float64.
        y: labels ``[N]``.
        decay: above 0, so that there is one minimum.
        start: ``[K, D]``.
    """
    weights = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [weights], max_iter=ITERATIONS, tolerance_grad=TOLERANCE, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss = F.cross_entropy(read @ weights.T, y) + decay / 2 * weights.square().sum()
        (weights.grad,) = torch.autograd.grad(loss, weights)
        return loss

    with torch.enable_grad():
        search.step(closure)
    return weights.detach()


def solved(read: Tensor, weights: Tensor, decay: float, b: Tensor) -> Tensor:
    """``H^-1 b`` ``[K, D]`` for the Hessian of :func:`fitted`'s loss at ``weights``, by conjugate gradients.

    Raises:
        UnsupportedModelError: no convergence.
    """
    p = (read @ weights.T).softmax(1)

    def product(v: Tensor) -> Tensor:
        change = read @ v.view_as(weights).T
        curved = p * (change - (p * change).sum(1, keepdim=True))
        return (curved.T @ read / len(read)).flatten() + decay * v

    solution, residual = conjugate_gradients(product, b.flatten(), ITERATIONS, TOLERANCE)
    if residual > 1e-3:
        raise UnsupportedModelError(f"conjugate gradients left a relative residual of {residual:.2g}: raise decay")
    return solution.view_as(weights)


def influence(read: Tensor, y: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
    """``[B]``: ``direction^T grad L(z_i)``, the change of the loss of each sample along a direction of the weights.

    Args:
        read: features ``[B, D]``, with a graph where the derivative in the input is asked for.
        y: labels ``[B]``.
        weights: ``[K, D]``.
        direction: ``[K, D]``.
    """
    error = (read @ weights.T).softmax(1) - F.one_hot(y, len(weights)).to(read)
    return (error * (read @ direction.T)).sum(1)
