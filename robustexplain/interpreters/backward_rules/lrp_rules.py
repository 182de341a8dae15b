"""Rules of layer-wise relevance propagation for one linear layer (Bach et al. 2015; Montavon et al. 2019).

A rule distributes the relevance ``R_k`` of a layer's outputs to its inputs in proportion to contributions
``z_jk = x_j w_jk``; the rules differ in which contributions they use. Each computes a sum of branches: modified inputs
through the layer with modified weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...maps import positive

Apply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""A linear layer as a function of input, weight and bias."""


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer and its input; a batch norm behind the layer is folded into weight and bias.

    Args:
        apply: the layer as a function of input, weight and bias.
        x: its input.
        weight: its weight.
        bias: its bias, if any.
        low: the smallest values that ``x`` can have, for the box rule.
        high: the largest ones.
    """

    apply: Apply
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None = None
    high: Tensor | None = None


class LRPRule(Protocol):
    """How the relevance of a layer's outputs is distributed to its inputs."""

    def __call__(self, layer: LinearLayer, relevance: Tensor, graph: bool) -> Tensor:
        """Relevance of ``layer.x``, from that of the layer's outputs."""
        ...


def stabilise(z: Tensor, epsilon: float) -> Tensor:
    """``z + epsilon sign(z)``, with the sign of zero taken as positive."""
    return z + torch.where(z >= 0, epsilon, -epsilon)


def negative(value: Tensor) -> Tensor:
    """``min(value, 0)``."""
    return torch.where(value < 0, value, 0)


def _share(x: Tensor, z: Tensor, s: Tensor, graph: bool) -> Tensor:
    """``x_j sum_k w_jk s_k`` for ``z`` linear in ``x``."""
    (gradient,) = torch.autograd.grad(z, x, s, create_graph=graph, retain_graph=True)
    return x * gradient


def _part_of_bias(value: Tensor | None, part: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if value is None else part(value)


Branch = tuple[Tensor, Tensor]
"""A part of the inputs, and what the layer makes of it with a part of its weights."""


def _agreeing(layer: LinearLayer) -> tuple[Branch, Branch]:
    """``x+ w+ (+ b+)`` and ``x- w-``: the positive contributions."""
    up, down = positive(layer.x), negative(layer.x)
    return (
        (up, layer.apply(up, positive(layer.weight), _part_of_bias(layer.bias, positive))),
        (down, layer.apply(down, negative(layer.weight), None)),
    )


def _opposing(layer: LinearLayer) -> tuple[Branch, Branch]:
    """``x+ w- (+ b-)`` and ``x- w+``: the negative contributions."""
    up, down = positive(layer.x), negative(layer.x)
    return (
        (up, layer.apply(up, negative(layer.weight), _part_of_bias(layer.bias, negative))),
        (down, layer.apply(down, positive(layer.weight), None)),
    )


@dataclass(frozen=True)
class Epsilon:
    """LRP-epsilon: all contributions, the denominator stabilised (Bach et al. 2015, eq. 58)."""

    epsilon: float

    def __call__(self, layer: LinearLayer, relevance: Tensor, graph: bool) -> Tensor:
        """Relevance of the layer's inputs."""
        z = layer.apply(layer.x, layer.weight, layer.bias)
        return _share(layer.x, z, relevance / stabilise(z, self.epsilon), graph)


@dataclass(frozen=True)
class AlphaBeta:
    """LRP-alpha-beta: positive contributions times alpha, negative ones times beta (Bach et al. 2015, eq. 60).

    ``alpha = 1, beta = 0`` is the z+ rule (Montavon et al. 2017), for inputs of both signs.
    """

    alpha: float
    beta: float
    epsilon: float

    def __call__(self, layer: LinearLayer, relevance: Tensor, graph: bool) -> Tensor:
        """Relevance of the layer's inputs."""
        total = self.alpha * self._part(_agreeing(layer), relevance, graph)
        return total - self.beta * self._part(_opposing(layer), relevance, graph) if self.beta else total

    def _part(self, branches: tuple[Branch, Branch], relevance: Tensor, graph: bool) -> Tensor:
        (x, z), (y, v) = branches
        s = relevance / stabilise(z + v, self.epsilon)
        return _share(x, z, s, graph) + _share(y, v, s, graph)


@dataclass(frozen=True)
class Gamma:
    """LRP-gamma, favouring positive contributions (Montavon et al. 2019, section 10.2.3), for inputs of both signs.

    For an output above zero the contributions are ``x+ (w + gamma w+) + x- (w + gamma w-)``, for one below zero the
    same with the signs of the additions exchanged (Andeol et al. 2021); on inputs and outputs above zero this is
    the original rule.
    """

    gamma: float
    epsilon: float

    def __call__(self, layer: LinearLayer, relevance: Tensor, graph: bool) -> Tensor:
        """Relevance of the layer's inputs."""
        z = layer.apply(layer.x, layer.weight, layer.bias)
        up, down = positive(layer.x), negative(layer.x)
        total = torch.zeros_like(layer.x)
        for chosen, toward, away in ((z > 0, positive, negative), (z < 0, negative, positive)):
            bias = _part_of_bias(layer.bias, lambda b, toward=toward: b + self.gamma * toward(b))  # type: ignore[misc]
            zs = (
                (up, layer.apply(up, layer.weight + self.gamma * toward(layer.weight), bias)),
                (down, layer.apply(down, layer.weight + self.gamma * away(layer.weight), None)),
            )
            s = torch.where(chosen, relevance / stabilise(zs[0][1] + zs[1][1], self.epsilon), 0)
            total = total + sum(_share(x, v, s, graph) for x, v in zs)
        return total


@dataclass(frozen=True)
class Flat:
    """The flat rule: relevance spread evenly over the receptive field (Lapuschkin et al. 2019)."""

    epsilon: float

    def __call__(self, layer: LinearLayer, relevance: Tensor, graph: bool) -> Tensor:
        """Relevance of the layer's inputs."""
        ones = torch.ones_like(layer.x).requires_grad_()
        z = layer.apply(ones, torch.ones_like(layer.weight), None)
        return _share(ones, z, relevance / stabilise(z, self.epsilon), graph)


@dataclass(frozen=True)
class BoxRule:
    """The z-B rule for inputs in a box: ``z = x w - low w+ - high w-`` (Montavon et al. 2017, eq. 18)."""

    epsilon: float

    def __call__(self, layer: LinearLayer, relevance: Tensor, graph: bool) -> Tensor:
        """Relevance of the layer's inputs."""
        assert layer.low is not None
        assert layer.high is not None
        low, high = (bound.detach().requires_grad_() for bound in (layer.low, layer.high))
        # Without the bias: in the three published terms it cancels.
        zs = (
            (layer.x, layer.apply(layer.x, layer.weight, None)),
            (low, layer.apply(low, positive(layer.weight), None)),
            (high, layer.apply(high, negative(layer.weight), None)),
        )
        s = relevance / stabilise(zs[0][1] - zs[1][1] - zs[2][1], self.epsilon)
        return _share(*zs[0], s, graph) - _share(*zs[1], s, graph) - _share(*zs[2], s, graph)
