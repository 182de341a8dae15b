"""How far a smoothed gradient map can move (after Dombrowski et al. 2019): a bound, and the curvature.

The bound holds for every input, and is far from tight. The curvature is that of one place, and is no bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import maps as ops
from ...autograd.rectifiers import swapped
from ...autograd.slopes import Slopes, network_slopes
from ...door import answer
from ...errors import UnsupportedModelError
from ...random_streams import generator
from ..base import Interpreter, explained_class, pick
from ..gradients.gradient import Gradient
from .beta_smoothed import Smoothed

# Bounds of p_c and log p_c as functions of the logits. |grad p_c| = p_c |e_c - p| <= sqrt(2) p_c (1 - p_c), and
# |Hess p_c| <= p_c |e_c - p|^2 + p_c |diag p - p p'| <= 8/27 + 1/2; |grad log p_c| = |e_c - p| and its Jacobian is
# that of the softmax, diag p - p p', of norm 1/2 at most.
_OF = {
    "logit": Slopes(1.0, 0.0),
    "probability": Slopes(math.sqrt(2) / 4, 8 / 27 + 1 / 2),
    "log_probability": Slopes(math.sqrt(2), 0.5),
}


def map_bound(interpreter: Interpreter, x: Tensor) -> float:
    """How far the map of a class moves at most, in L2, for each unit that the input moves in L2.

    Dombrowski et al. 2019 bound normalised gradients along a level set of the output; here it is the gradient itself,
    and the path may be any: no more is known than that the class explained stays the same. The bound is linear in beta
    for logits. It says nothing about a map that is rescaled before it is compared, or ranked.

    Args:
        interpreter: :class:`Smoothed` around :class:`Gradient`.
        x: an input of the network's size, ``[1, C, H, W]``.

    Raises:
        UnsupportedModelError: another interpreter; a network with steps that have kinks or no known slope.
    """
    if not isinstance(interpreter, Smoothed) or not isinstance(interpreter.base, Gradient):
        raise UnsupportedModelError("the bound is known for a gradient that is smoothed, and for nothing else")
    base = interpreter.base
    if base.layer is not None or base.pool != 1:
        raise UnsupportedModelError("the bound is known for a gradient by the input that is not pooled")
    score = _OF[base.of]
    network = network_slopes(base.model, x, interpreter.smooth.beta)
    # The largest magnitude over channels moves no further than the gradient; a sum, by the root of their number.
    channels = x.shape[1] if base.channels != "max" and x.dim() == 4 else 1
    return math.sqrt(channels) * network.then(score.first, score.second).second


def curvature(interpreter: Smoothed, x: Tensor, target: Tensor | None = None, steps: int = 20, seed: int = 0) -> Tensor:
    """The largest principal curvature ``|lambda_max|`` of the level set of the class's logit at ``x``, ``[B]``.

    How far the normalised gradient of the smoothed network turns for a unit of the way along the level set, to first
    order: what Dombrowski et al. 2019 bound, at one place. By power iteration on ``P H P / |grad|``, ``P`` the
    projection on the tangent space: an estimate from below.

    Args:
        interpreter: smoothed; it is its network that is looked at.
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        target: ``[B]`` classes; default the prediction.
        steps: of the power iteration, a backward pass each.
        seed: of its start.
    """
    with torch.enable_grad():
        target = explained_class(answer(interpreter.model, x).detach(), target)
        x = x.detach().clone().requires_grad_()
        with swapped(interpreter.smooth):
            score = pick(answer(interpreter.model, x), target).sum()
            (gradient,) = torch.autograd.grad(score, x, create_graph=True)
            length = gradient.detach().flatten(1).norm(dim=1)
            normal = _unit(gradient.detach())
            start = torch.randn(x.shape[1:], generator=generator(seed, "curvature"), dtype=torch.float32)
            v = _tangent(start.to(x).expand_as(x), normal)
            size = torch.zeros_like(length)
            for _ in range(steps):
                (turned,) = torch.autograd.grad(gradient, x, _unit(v), retain_graph=True)
                v = _tangent(turned.detach(), normal)
                size = v.flatten(1).norm(dim=1)
    found: Tensor = size / length.clamp(min=torch.finfo(length.dtype).tiny)
    return found


def _unit(values: Tensor) -> Tensor:
    length: Tensor = values.flatten(1).norm(dim=1).clamp(min=torch.finfo(values.dtype).tiny)
    return values / ops.expand(length, values)


def _tangent(values: Tensor, normal: Tensor) -> Tensor:
    return values - ops.expand((values * normal).flatten(1).sum(1), values) * normal
