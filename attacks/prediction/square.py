"""The Square attack: random search with shrinking squares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from robustexplain.fields import Count, Fraction, Radius
from robustexplain.objectives import Goal, Margin, Misclassify, Objective
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.rounding import wide
from robustexplain.system import System

from ..base import Attack
from ..search.best import BestIterates, SearchRecord
from ..search.directions import observe
from ..search.loop import Plan, SearchResult
from ..threat import L2, Linf, Norm, Threat
from .gradient import ball

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Numbers of queries, of 10,000, after which the share of pixels is halved (section 5, "hyperparameters")."""
_REDRAWS = 8


@dataclass(frozen=True)
class _Squares(Plan):
    """Random search: one proposal and query per step, kept if it is better, within a query budget."""

    threat: Linf | L2
    share: float
    max_queries: int

    @property
    def aim(self) -> Objective:
        return Margin()

    @property
    def summary(self) -> str:
        return f"random squares, {self.max_queries} queries"

    @torch.no_grad()
    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        objective = Margin() if goal.goal_class is None else Misclassify()
        best, record = BestIterates.none(goal.x), SearchRecord.none(goal.x)

        def evaluate(rows: Tensor, here: Goal, x: Tensor, *, always: bool = False) -> Tensor:
            record.queries[rows] += 1
            seen = observe(system, x, here, frozenset())
            return best.update(rows, seen, here, objective, always=always)

        rows = torch.arange(len(goal.x), device=goal.x.device)
        for query in range(self.max_queries):
            if query == 0:
                done = evaluate(rows, goal, goal.x)
            elif query == 1:
                # As published, the search continues from the first proposal even if that is worse than the image.
                done = evaluate(rows, goal, self._first(goal.x, streams), always=True)
            else:
                side = math.sqrt(self._share(query - 2) * goal.x.shape[-2] * goal.x.shape[-1])
                done = evaluate(rows, goal, self._next(goal.x, best.x[rows], side, streams))
            if bool(done.any()):
                rows, goal, streams = rows[~done], goal.select(~done), streams.select((~done).nonzero()[:, 0])
            if not len(rows):
                break
        return SearchResult.judged(best, record)

    def _share(self, step: int) -> float:
        """``p``, the share of pixels that one proposal changes."""
        place = int(step / self.max_queries * 10_000)
        return self.share / 2.0 ** sum(place > mark for mark in _HALVINGS)

    def _first(self, x: Tensor, streams: Streams) -> Tensor:
        if self.threat.norm == "linf":
            stripes = _signs(x[:, :, :1], streams)
            return self.threat.project(x, x + self.threat.eps * stripes)
        return self._at_radius(x, _tiles(x, streams))

    def _next(self, x: Tensor, best: Tensor, side: float, streams: Streams) -> Tensor:
        smaller = min(x.shape[-2:])
        if self.threat.norm == "l2":
            odd = max(round(side), 3) // 2 * 2 + 1
            return self._at_radius(x, self._moved(wide(best) - wide(x), min(odd, (smaller - 1) // 2 * 2 + 1), streams))
        size = max(min(round(side), smaller - 1), 1)
        proposal = self._painted(x, best, size, streams)
        for _ in range(_REDRAWS):
            same = (proposal == best).flatten(1).all(1).nonzero()[:, 0]
            if not len(same):
                break
            proposal[same] = self._painted(x[same], best[same], size, streams.select(same))
        return proposal

    def _painted(self, x: Tensor, best: Tensor, size: int, streams: Streams) -> Tensor:
        """A square of ``+-eps``, one sign per channel (Algorithm 2)."""
        b, c, row, column = _window(x, size, streams)
        inside = torch.zeros_like(x, dtype=torch.bool)
        inside[b, c, row, column] = True
        moved = x + self.threat.eps * _signs(x[:, :, :1, :1], streams)
        return self.threat.project(x, torch.where(inside, moved, best))

    def _moved(self, delta: Tensor, size: int, streams: Streams) -> Tensor:
        """The change with the mass of one window moved into another (Algorithm 3)."""
        here, there = _window(delta, size, streams), _window(delta, size, streams)
        both = torch.zeros_like(delta)
        both[here] = both[there] = 1
        unused = (self.threat.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
        mass = ((delta * both).square().sum((2, 3), keepdim=True) + unused / delta.shape[1]).sqrt()
        new = _bumps(delta, size, streams) * _signs(delta[:, :, :1, :1], streams) + _unit(delta[here], (2, 3))
        delta = delta.clone()
        delta[there] = 0
        delta[here] = _unit(new, (2, 3)) * mass
        return delta

    def _at_radius(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.threat.project(x, x + _unit(delta, (1, 2, 3)) * self.threat.eps)


def _unit(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values / values.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12)


def _signs(like: Tensor, streams: Streams) -> Tensor:
    return torch.where(streams.uniform(like) < 0.5, -1, 1).to(like.dtype)


def _window(x: Tensor, size: int, streams: Streams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of a square with sides of ``size`` pixels at a random place for each sample, in all channels."""
    batch, channels, height, width = x.shape
    draw = streams.uniform(torch.empty(batch, 2, device=x.device, dtype=torch.float64))
    room = torch.tensor([height - size + 1, width - size + 1], device=x.device)
    corner = (draw * room).long()
    reach = torch.arange(size, device=x.device)
    row, column = corner[:, :1] + reach, corner[:, 1:] + reach
    b, c = torch.arange(batch, device=x.device), torch.arange(channels, device=x.device)
    return b[:, None, None, None], c[None, :, None, None], row[:, None, :, None], column[:, None, None, :]


def _bumps(x: Tensor, size: int, streams: Streams) -> Tensor:
    """``eta`` ``[B, 1, size, size]`` of the L2 attack, upright or transposed at random for each sample."""
    bump = torch.tensor(_bump(size), device=x.device, dtype=x.dtype)
    transposed = streams.uniform(x[:, :1, :1, :1]) < 0.5
    return torch.where(transposed, bump.T, bump)


def _tiles(x: Tensor, streams: Streams) -> Tensor:
    """The first change of the L2 attack: bumps side by side, five per side, with a random sign for each channel."""
    height, width = x.shape[-2:]
    size = max(1, height // 5)
    x = wide(x)
    delta = torch.zeros_like(x)
    down, across = (height % size) // 2, (width % size) // 2
    for top in range(down, height - size + 1, size):
        for left in range(across, width - size + 1, size):
            bump = _bumps(x, size, streams) * _signs(x[:, :, :1, :1], streams)
            delta[:, :, top : top + size, left : left + size] = bump
    return delta


@cache
def _bump(size: int) -> tuple[tuple[float, ...], ...]:
    """Two halves of opposite sign, each a sum of concentric rectangles (section 3.4); of norm one."""
    upper, lower = _heap(size // 2, size), -_heap(size - size // 2, size)
    bump = torch.cat([upper, lower])
    return tuple(map(tuple, (bump / bump.norm()).tolist()))


def _heap(height: int, width: int) -> Tensor:
    """``sum_r 1 / (r + 1)^2`` over rectangles that extend ``r`` from the middle, normalised."""
    heap = torch.zeros(height, width, dtype=torch.float64)
    top, left = height // 2, width // 2
    for r in range(max(height, width) // 2 + 1):
        rows, columns = (slice(max(middle - r, 0), middle + r + 1) for middle in (top, left))
        heap[rows, columns] += 1 / (r + 1) ** 2
    found: Tensor = heap / heap.norm().clamp(min=1e-12)
    return found


@ATTACKS.register("square", paper="Andriushchenko et al. 2020, Algorithms 1-3")
@dataclass(frozen=True)
class Square(Attack):
    """Random search: one square of the image is changed at a time and kept if the loss falls; one query per step.

    Untargeted the loss is the logit margin, targeted the cross-entropy, as published. It starts from vertical stripes
    (L-infinity) or tiles of bumps (L2); the squares shrink on the published schedule, spread over the budget. A sample
    stops at its first success. Departures from the authors' code: places are drawn for each sample, also in L2; they
    include the last row and column, as in the paper; one query checks whether the image is misclassified already; a
    proposal that changes nothing is drawn again at most 8 times.

    Args:
        eps: radius of the ball.
        max_queries: most queries for one sample.
        p_init: share of the pixels in the first squares.
        norm: ``linf`` or ``l2``.
    """

    eps: Radius = 8 / 255
    max_queries: Count = 5000
    p_init: Fraction = 0.8
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def plan(self, system: System) -> Plan:
        """Random squares."""
        threat: Threat = ball(self.norm, self.eps)
        assert isinstance(threat, (Linf, L2))
        return _Squares(threat, self.p_init, self.max_queries)
