"""The parts of influence functions: the model as a function of its weights, derivatives and linear solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...autograd import layers
from ...autograd.hooks import copy_with_shared_weights
from ...door import answer
from ...errors import InputError, UnsupportedModelError

Logits = Callable[[Tensor, Tensor], Tensor]
"""Logits of inputs (images, or features of the head) under a flat vector of weights."""
MatrixProduct = Callable[[Tensor], Tensor]
"""A symmetric matrix times a vector."""


def conjugate_gradients(product: MatrixProduct, b: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, float]:
    """``A^-1 b`` and its relative residual (Hestenes and Stiefel 1952).

    Raises:
        InputError: ``A`` is not positive definite: a direction of nonpositive curvature was found.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr, target = r, r @ r, (tolerance * b.norm()) ** 2
    for _ in range(iterations):
        if rr <= target:
            break
        q = product(p)
        curvature = p @ q
        if curvature <= 0:
            raise InputError(
                f"the damped curvature is not positive definite ({float(curvature / (p @ p)):.3g} along a direction): "
                "raise damping, or use curvature='gauss_newton'"
            )
        alpha = rr / curvature
        x, r = x + alpha * p, r - alpha * q
        rr, previous = r @ r, rr
        p = r + rr / previous * p
    return x, float(rr.sqrt() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))


def lissa(product: MatrixProduct, b: Tensor, iterations: int, tolerance: float, scale: float) -> tuple[Tensor, float]:
    """``A^-1 b`` and its relative residual by ``v <- v + (b - A v) / scale``.

    Source: Agarwal et al. 2017; Koh and Liang 2017, section 3.
    """
    v, size = b / scale, b.norm().clamp(min=torch.finfo(b.dtype).tiny)
    residual = b - product(v)
    for _ in range(iterations):
        if residual.norm() <= tolerance * size:
            break
        v = v + residual / scale
        residual = b - product(v)
    return v, float(residual.norm() / size)


class Solve(torch.autograd.Function):
    """``A^-1 b`` for a symmetric constant ``A``: its derivative by ``b`` is one more solve."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        """``A^-1 b``."""
        ctx.solve = solve
        with torch.enable_grad():
            return solve(b.detach()).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """``A^-1`` of the incoming gradient, itself differentiable."""
        return Solve.apply(grads[0], ctx.solve), None


def directional(values: Tensor, weights: Tensor, v: Tensor, *, graph: bool = False) -> Tensor:
    """The derivative of ``values`` along ``v``, by differentiating a vector-Jacobian product (no forward mode)."""
    dummy = torch.zeros_like(values, requires_grad=True)
    (pulled,) = torch.autograd.grad(values, weights, dummy, create_graph=True)
    found: Tensor = torch.autograd.grad(pulled @ v, dummy, create_graph=graph, retain_graph=True)[0]
    return found


def flat(parameters: list[Tensor]) -> Tensor:
    """One vector of all of them, detached."""
    return torch.cat([p.detach().flatten() for p in parameters])


def whole(model: nn.Module, parameters: dict[str, Tensor]) -> Logits:
    """The model as a function of :func:`flat` of its parameters, and of images."""
    # functional_call puts the weights into the module that it is given, which other threads may be running.
    model = copy_with_shared_weights(model)
    sizes, shapes = [p.numel() for p in parameters.values()], [p.shape for p in parameters.values()]

    def logits(weights: Tensor, x: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(weights.split(sizes), shapes, strict=True)]
        found: Tensor = torch.func.functional_call(model, dict(zip(parameters, parts, strict=True)), (x,))
        return found

    return logits


def linear(width: int, bias: bool) -> Logits:
    """A linear layer as a function of :func:`flat` of its parameters, and of features."""

    def logits(weights: Tensor, features: Tensor) -> Tensor:
        classes = len(weights) // (width + bias)
        matrix = weights[: classes * width].view(classes, width)
        return F.linear(features, matrix, weights[classes * width :] if bias else None)

    return logits


def features(model: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    """The input of the head when the model runs on ``x``."""
    inputs: list[Tensor] = []
    with layers.hooks([head], before=lambda module, args, kwargs: inputs.append(args[0])):
        answer(model, x)
    return inputs[-1]


@torch.no_grad()
def last_linear(model: nn.Module, x: Tensor) -> str:
    """The name of the linear layer whose output is the logits.

    Raises:
        UnsupportedModelError: if there is none.
    """
    outputs: list[tuple[str, Tensor]] = []
    linears: dict[nn.Module, str] = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n}
    with layers.hooks(list(linears), lambda module, args, output: outputs.append((linears[module], output))):
        logits = answer(model, x[:1])
    if outputs and outputs[-1][1].shape == logits.shape and torch.equal(outputs[-1][1], logits):
        return outputs[-1][0]
    raise UnsupportedModelError(
        f"the logits of this {type(model).__name__} are not the output of a linear layer; use parameters='all'"
    )
