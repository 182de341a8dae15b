"""Correlations of maps: of their values, and of their ranks.

A constant map orders nothing and varies with nothing: against it every correlation is undefined and given as NaN, with
zero gradient (scipy gives NaN too; torchmetrics gives 0 for Spearman).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import maps as ops
from ..registry import METRICS
from .base import MapMetric


@METRICS.register("pearson", paper="Adebayo et al. 2018, section 4")
@dataclass(frozen=True)
class Pearson(MapMetric):
    """Pearson's correlation over pixels, in ``[-1, 1]``; 1 is equal up to scale and offset.

    NaN if either map is constant.
    """

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)
    differentiable: ClassVar[bool] = True

    def _compare(self, maps: Tensor, reference: Tensor) -> Tensor:
        return ops.correlation(maps.flatten(1), reference.flatten(1))


@METRICS.register("spearman", paper="Ghorbani et al. 2019, section 3; Adebayo et al. 2018, section 4")
@dataclass(frozen=True)
class Spearman(MapMetric):
    """Spearman's rank correlation over pixels, ties by average rank, in ``[-1, 1]``; 1 is the same order.

    NaN if either map is constant.

    Args:
        magnitude: rank magnitudes; Adebayo et al. report the figure for signed values and for magnitudes.
    """

    magnitude: bool = False

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)

    def _compare(self, maps: Tensor, reference: Tensor) -> Tensor:
        a, b = ((m.abs() if self.magnitude else m).flatten(1).detach() for m in (maps, reference))
        return ops.correlation(ops.ranks(a), ops.ranks(b))


@METRICS.register("kendall", paper="Chen et al. 2019, robust attribution regularization")
@dataclass(frozen=True)
class Kendall(MapMetric):
    """Kendall's rank correlation tau-b over pixels, in ``[-1, 1]``; 1 is the same order.

    Exact and in ``N log N``: maps of 224 x 224 need no subsampling. NaN if either map is constant.

    Args:
        magnitude: rank magnitudes instead of signed values.
    """

    magnitude: bool = False

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)

    def _compare(self, maps: Tensor, reference: Tensor) -> Tensor:
        a, b = ((m.abs() if self.magnitude else m).flatten(1).detach() for m in (maps, reference))
        return kendall_tau(a, b)


def kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    """Tau-b of the rows of two ``[B, N]``, ``[B]`` (Knight 1966); NaN where a row is constant."""
    order_a, order_b = ops.row_order(a), ops.row_order(b)
    # Without ties, as in most maps, tau is the share of pairs in the same order less that of the others.
    pairs = max(1, a.shape[1] * (a.shape[1] - 1) // 2)
    tau = 1 - 2 * inversions(_inverse(order_b).gather(1, order_a)).to(a.dtype) / pairs
    tied = ~(_steps(a.gather(1, order_a)) & _steps(b.gather(1, order_b))).all(1)
    if a.shape[1] == 1:
        return torch.full_like(tau, torch.nan)
    if bool(tied.any()):
        tau[tied] = _with_ties(a[tied], b[tied])
    return tau


def _with_ties(a: Tensor, b: Tensor) -> Tensor:
    # Sorted by b first and then, stably, by a: ordered by a, ties in a ordered by b.
    rows = b.argsort(stable=True)
    rows = rows.gather(1, a.gather(1, rows).argsort(stable=True))
    a, b = a.gather(1, rows), b.gather(1, rows)
    order = b.argsort(stable=True)
    discordant = inversions(_inverse(order))
    new_a, new_b = _steps(a), _steps(b)
    tied_a, tied_b, tied_both = _pairs(new_a), _pairs(_steps(b.gather(1, order))), _pairs(new_a | new_b)
    n = a.shape[1]
    pairs = n * (n - 1) // 2
    excess = (pairs - tied_a - tied_b + tied_both - 2 * discordant).to(a.dtype)
    untied_a, untied_b = ((pairs - tied).to(a.dtype) for tied in (tied_a, tied_b))
    scale = untied_a.sqrt() * untied_b.sqrt()
    tau = (excess / scale.clamp(min=1)).clamp(-1, 1)
    return torch.where(scale > 0, tau, torch.full_like(tau, torch.nan))


def inversions(permutations: Tensor) -> Tensor:
    """``[B]``: pairs ``i < j`` with ``p[i] > p[j]`` in each row of ``[B, N]``, a permutation of ``0 .. N - 1``.

    Two values differ first in some bit; for each bit, the values that share all higher ones form a block, and in it
    every value without the bit is inverted with all those that have it and stand before it. A bit is one pass over all
    rows, so the work grows as ``N log^2 N`` without a loop over samples or pairs.
    """
    batch, n = permutations.shape
    bits = max(1, (n - 1).bit_length())
    padding = torch.arange(n, 1 << bits, device=permutations.device).expand(batch, -1)
    places = _inverse(torch.cat([permutations, padding], 1)).to(torch.int32)
    total = torch.zeros(batch, dtype=torch.int64, device=permutations.device)
    for bit in range(bits):
        half = 1 << bit
        blocks = places.reshape(batch, -1, 2, half)
        has = torch.arange(2, device=places.device, dtype=torch.int32)[:, None]
        # Sorted by place, the lowest bit of the key tells which have the bit.
        keys = ops.ascending((2 * blocks + has).reshape(-1, 2 * half))
        before = (keys & 1).cumsum(1, dtype=torch.int32).reshape(batch, -1)
        # Summed over all places; the second term is what those that have the bit count of each other.
        total += before.sum(1, dtype=torch.int64) - blocks.shape[1] * (half * (half + 1) // 2)
    return total


def _inverse(order: Tensor) -> Tensor:
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _steps(ordered: Tensor) -> Tensor:
    # Where a row's value differs from the one before it; a row's first is new.
    first = torch.ones_like(ordered[:, :1], dtype=torch.bool)
    return torch.cat([first, ordered[:, 1:] != ordered[:, :-1]], 1)


def _pairs(new: Tensor) -> Tensor:
    # How many pairs lie in the same run: each member of a run is paired with those between it and the run's start.
    at = torch.arange(new.shape[1], device=new.device).expand_as(new)
    start = torch.where(new, at, torch.zeros_like(at)).cummax(1).values
    return (at - start).sum(1)
