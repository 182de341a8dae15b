"""Upper bounds on how fast a network with smooth rectifiers, and its gradient, can change: from the weights alone.

For a composition, ``L1(g o h) = L1(g) L1(h)`` bounds the values and ``L2(g o h) = L2(g) L1(h)^2 + L1(g) L2(h)`` the
Jacobian, both in L2. Linear steps have ``L2 = 0``; ``softplus_beta`` has ``L1 = 1`` and ``L2 = beta / 4``, its largest
second derivative. Without a softmax the result is ``beta C`` with ``C`` a function of the weights: as in the bound
of Dombrowski et al. 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .tape import Call, record

_KEEP = {"flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose", "movedim"}
"""Calls that only lay the same numbers out anew."""


@dataclass(frozen=True)
class Slopes:
    """Bounds of a function in L2.

    Args:
        first: how far its value moves for a unit of its input.
        second: how far its Jacobian moves, in spectral norm.
    """

    first: float
    second: float

    def then(self, first: float, second: float = 0.0) -> Slopes:
        """Those of the composition with an outer function of these bounds."""
        return Slopes(first * self.first, second * self.first**2 + first * self.second)


def network_slopes(model: nn.Module, x: Tensor, beta: float) -> Slopes:
    """The bounds of a network's logits with ``softplus_beta`` for every rectifier; of any single logit, too.

    Args:
        model: convolutions, linear layers, normalisations, averages and sums, with rectifiers as its only activations.
        x: an input of the network's size, ``[1, ...]``.
        beta: of the softplus.

    Raises:
        UnsupportedModelError: another step, such as max pooling, which has kinks that softplus leaves as they are.
    """
    with torch.enable_grad():
        tape = record(model, x[:1].detach().clone().requires_grad_())
        found: dict[int, Slopes] = {}
        for step in tape.steps:
            inner = [found[source.step.index] for source in step.sources]
            found[step.index] = _after(step, inner, beta) if inner else Slopes(1.0, 0.0)
    return found[tape.last[0].index]


def _after(step: Call, inner: list[Slopes], beta: float) -> Slopes:
    kind = step.kind
    if step.rectifies:
        return inner[0].then(1.0, beta / 4)
    if kind == "sum" and step.argument(2, "alpha", 1) == 1:
        return Slopes(sum(i.first for i in inner), sum(i.second for i in inner))
    if len(inner) == 1:
        if kind == "identity" or (kind == "shape" and step.name in _KEEP):
            return inner[0]
        if kind == "linear":
            return inner[0].then(_norm(step))
        if kind in ("batch_norm", "affine"):
            return inner[0].then(_largest_sum(step))
        if kind == "average" and step.name != "sum":
            # Weights of an average add up to one; the norm is at most the root of this times the largest column sum.
            return inner[0].then(math.sqrt(_largest_sum(step)))
    raise UnsupportedModelError(
        f"no bound on how fast the gradient changes: {step.name!r} is a step with kinks, or of no known slope"
    )


def _largest_sum(step: Call) -> float:
    """The largest column sum of a linear step without negative weights, or magnitude of a diagonal one."""
    (column,) = step.vjp([torch.ones_like(step.outputs[0])], graph=False)
    return float(column.detach().abs().max())


def _norm(step: Call) -> float:
    """An upper bound on the spectral norm of a convolution or a linear layer.

    The smaller of two: the root of the largest row sum times the largest column sum of magnitudes (Schur), and the
    norm of the kernel as a matrix times the root of how often a pixel is read (Tsuzuku et al. 2018).
    """
    weight = step.argument(1, "weight").detach().double()
    if step.name == "linear":
        return float(torch.linalg.matrix_norm(weight, 2))
    groups = int(step.argument(6, "groups", 1))
    blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    schur = math.sqrt(float(blocks.abs().sum((2, 3)).max() * blocks.abs().sum((1, 3)).max()))
    reads = math.prod(_reads(step, axis, size) for axis, size in enumerate(weight.shape[2:]))
    return min(schur, math.sqrt(reads) * float(torch.linalg.matrix_norm(blocks.flatten(2), 2).max()))


def _reads(step: Call, axis: int, size: int) -> int:
    """How many windows along an axis read a pixel at most."""
    stride, dilation = (_entry(step.argument(at, name, 1), axis) for at, name in ((3, "stride"), (5, "dilation")))
    return size if dilation != 1 else math.ceil(size / stride)


def _entry(value: int | tuple[int, ...], axis: int) -> int:
    return value if isinstance(value, int) else value[axis if len(value) > 1 else 0]
