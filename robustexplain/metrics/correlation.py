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

    A radix sort from the highest bit down: within a block of equal higher bits, a 0 is inverted with every 1 before it.
    Every level is one pass over all rows, so the work is ``N log N`` without a loop over samples.
    """
    batch, n = permutations.shape
    bits = max(1, (n - 1).bit_length())
    padding = torch.arange(n, 1 << bits, device=permutations.device).expand(batch, -1)
    values = torch.cat([permutations, padding], 1)
    total = torch.zeros(batch, dtype=torch.int64, device=permutations.device)
    for bit in reversed(range(bits)):
        blocks = values.reshape(batch, -1, 2 << bit)
        ones = (blocks >> bit) & 1
        before = ones.cumsum(-1)
        total += (before * (1 - ones)).sum((1, 2))
        # Values are distinct and fill their block: as many 0s as 1s, so the halves' places are known.
        at = torch.arange(2 << bit, device=values.device)
        place = torch.where(ones.bool(), (1 << bit) + before - 1, at - before)
        values = torch.empty_like(blocks).scatter_(-1, place, blocks).reshape(batch, -1)
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
