"""Weights of an aggregate's members, chosen on clean inputs so that the aggregate moves less, or is less complex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.interpreters import Aggregate
from robustexplain.metrics import AvgSensitivity

from .calibration import maps_of

Goal = Literal["sensitivity", "complexity"]
"""What the weights lower: the mean relative change of the map among near inputs, or the entropy of its magnitudes."""
STEPS = 300
PLACES = 6


def learned_weights(
    aggregate: Aggregate, x: Tensor, classes: Tensor, goal: Goal, least: float, batch_size: int, seed: int
) -> tuple[tuple[float, ...], float, float]:
    """The weights, and what they are chosen for at equal weights and at these (Bhatt et al. 2020).

    By exponentiated gradient on the simplex from equal weights; the best iterate counts, so that the result is never
    worse than equal weights on ``x``.

    Args:
        aggregate: a mean of maps.
        x: clean inputs ``[N, ...]``.
        classes: ``[N]``, explained.
        goal: ``sensitivity`` as :class:`robustexplain.metrics.AvgSensitivity`, ``complexity`` as
            :class:`robustexplain.metrics.Complexity`.
        least: the weight of every member at least.
        batch_size: inputs at once.
        seed: of the near inputs.
    """
    maps = _rescaled(aggregate, x, classes, batch_size)
    sensitivity = goal == "sensitivity"
    value = _sensitivity(aggregate, maps, x, classes, batch_size, seed) if sensitivity else _complexity(maps)
    return _descend(value, len(aggregate.members), least)


def _complexity(maps: Tensor) -> Callable[[Tensor], Tensor]:
    def value(weights: Tensor) -> Tensor:
        return ops.entropy((weights[:, None, None] * maps).sum(0)).mean()

    return value


def _rescaled(aggregate: Aggregate, x: Tensor, classes: Tensor, batch_size: int) -> Tensor:
    """The members' rescaled maps, float64 ``[M, N, P]`` on the CPU, which has that precision."""
    found = [maps_of(member, x, classes, batch_size) for member in aggregate.members]
    return torch.stack([ops.rescale(m, aggregate.rescale).flatten(1).cpu().double() for m in found])


def _sensitivity(
    aggregate: Aggregate, maps: Tensor, x: Tensor, classes: Tensor, batch_size: int, seed: int
) -> Callable[[Tensor], Tensor]:
    # |sum_j w_j d_j|^2 = w' G w: the matrices of inner products are all that the descent needs of the maps.
    own = torch.einsum("inp,jnp->nij", maps, maps)
    moves = []
    for near in AvgSensitivity(samples=4, seed=seed).neighbours(x):
        change = _rescaled(aggregate, near, classes, batch_size) - maps
        moves.append(torch.einsum("inp,jnp->nij", change, change))

    def value(weights: Tensor) -> Tensor:
        size = _norm(own, weights)
        return torch.stack([(_norm(move, weights) / size).mean() for move in moves]).mean()

    return value


def _norm(products: Tensor, weights: Tensor) -> Tensor:
    squares = torch.einsum("nij,i,j->n", products, weights, weights)
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def _descend(value: Callable[[Tensor], Tensor], members: int, least: float) -> tuple[tuple[float, ...], float, float]:
    free = 1 - members * least
    equal = shares = torch.full((members,), 1 / members, dtype=torch.float64)
    start = best = float(value(equal))
    chosen = equal
    for step in range(STEPS):
        weights = (least + free * shares).requires_grad_()
        loss = value(weights)
        if float(loss.detach()) < best:
            best, chosen = float(loss.detach()), weights.detach()
        (gradient,) = torch.autograd.grad(loss, weights)
        largest = gradient.abs().max()
        if not float(largest) > 0:
            break
        shares = shares * torch.exp(-0.2 * (1 - step / STEPS) * gradient / largest)
        shares = shares / shares.sum()
    return _rounded(chosen), start, best


def _rounded(weights: Tensor) -> tuple[float, ...]:
    """Of few digits, so that they are the same on machines that differ in last bits; the sum stays one."""
    found = [round(float(w), PLACES) for w in weights]
    largest = max(range(len(found)), key=found.__getitem__)
    found[largest] = round(found[largest] + 1 - sum(found), PLACES)
    return tuple(found)
