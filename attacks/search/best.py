"""The best iterate of a search and whether it improved, both evaluated on the real system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.objectives import Goal, Objective, Observation, Weight, sum_losses

Rows = Tensor | slice
"""Which samples of a batch: their indices, or ``slice(None)`` for all of them, which copies nothing."""


@dataclass
class SearchRecord:
    """Figures that a search records, one entry per sample of the whole batch.

    Args:
        queries: inputs evaluated by the system so far.
        zero_direction: where the first direction was exactly zero.
        surrogate_start: the surrogate's first loss; infinite without a surrogate.
        surrogate_lowest: the surrogate's lowest loss; infinite without a surrogate.
    """

    queries: Tensor
    zero_direction: Tensor
    surrogate_start: Tensor
    surrogate_lowest: Tensor

    @classmethod
    def none(cls, x: Tensor) -> SearchRecord:
        """Before the first evaluation."""
        infinite = torch.full((len(x),), torch.inf, device=x.device, dtype=torch.float32)
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(count, count > 0, infinite, infinite.clone())

    def follow(self, rows: Rows, loss: Tensor, *, first: bool) -> None:
        """Record a loss of the surrogate."""
        loss = loss.float()
        if first:
            before = self.surrogate_start[rows]
            self.surrogate_start[rows] = torch.where(before.isinf(), loss, before)
        self.surrogate_lowest[rows] = torch.minimum(self.surrogate_lowest[rows], loss)

    def verdict(self, best: BestIterates) -> tuple[Tensor, Tensor]:
        """``stalled`` and ``surrogate_misled``, ``[B]`` bool: see :class:`~.loop.SearchResult`."""
        stalled = best.stalled()
        # Without a surrogate both are infinite, and the comparison is false.
        fell = self.surrogate_lowest < self.surrogate_start - 1e-3 * self.surrogate_start.abs()
        return stalled, stalled & fell


class _Start(NamedTuple):
    """The first evaluation on the real system, to which later ones are compared."""

    unmet: Tensor
    score: Tensor
    least: float
    """The least possible loss."""
    only_constraints: bool
    """Whether the objective consists of constraints alone, so that a sample that meets them is finished."""

    def beaten(self, unmet: Tensor, score: Tensor) -> Tensor:
        """Where fewer constraints are unmet, or as many and the loss fell: ``[B]`` bool."""
        gained = (unmet < self.unmet) | ((unmet == self.unmet) & (score < self.score))
        return gained | (unmet == 0) if self.only_constraints else gained


@dataclass
class BestIterates:
    """Per sample, the best iterate so far: the least unmet constraints, then the lowest score."""

    x: Tensor
    unmet: Tensor
    score: Tensor
    gained: Tensor
    """``[B]`` bool, where an earlier iterate improved on the start; for searches that return their last iterate."""
    start: _Start | None = None

    @classmethod
    def none(cls, x: Tensor) -> BestIterates:
        """Before the first evaluation."""
        infinite = torch.full((len(x),), torch.inf, device=x.device, dtype=torch.float32)
        return cls(x.clone(), infinite, infinite.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def update(
        self, rows: Rows, seen: Observation, goal: Goal, objective: Objective, *, always: bool = False
    ) -> Tensor:
        """Keep what is better (with ``always`` the new iterate); where all constraints are met, ``[rows]`` bool.

        The first call must be with all samples.
        """
        unmet, score = rank(objective, seen, goal)
        if self.start is None:
            only_constraints = all(part.constraint for _, part in objective.terms())
            self.start = _Start(unmet, score, sum(part.least for _, part in _deciding(objective)), only_constraints)
        before, lowest = self.unmet[rows], self.score[rows]
        better = (unmet < before) | ((unmet == before) & (score < lowest))
        if always:
            self.gained |= self.start.beaten(self.unmet, self.score)
            better = torch.ones_like(better)
        self.x = _put(self.x, rows, torch.where(ops.expand(better, seen.x), seen.x.detach(), self.x[rows]))
        self.unmet = _put(self.unmet, rows, torch.where(better, unmet, before))
        self.score = _put(self.score, rows, torch.where(better, score, lowest))
        return unmet == 0

    def stalled(self) -> Tensor:
        """``[B]`` bool: where no iterate improved on the first evaluation, although it was not the least possible."""
        if self.start is None:
            return torch.ones_like(self.gained)
        gained = self.gained | self.start.beaten(self.unmet, self.score)
        return (self.start.score > self.start.least) & ~gained


def _put(old: Tensor, rows: Rows, new: Tensor) -> Tensor:
    """``old`` with ``new`` at ``rows``, in place; ``new`` itself, if these are all."""
    if isinstance(rows, slice):
        return new
    old[rows] = new
    return old


def rank(objective: Objective, seen: Observation, goal: Goal) -> tuple[Tensor, Tensor]:
    """Unmet constraints ``[B]``, and the loss ``[B]`` that decides among equals, with the search's final weights.

    Both are infinite where logits are not finite, or the loss is NaN: such an answer is no success, and worse than any
    other.
    """
    with torch.no_grad():
        unmet = [part.unmet(seen, goal) for _, part in objective.terms() if part.constraint]
        total = (
            sum(unmet[1:], unmet[0]) if unmet else torch.zeros(len(seen.x), device=seen.x.device, dtype=torch.float32)
        )
        # A loss that the direction computed and noted still has its graph: detach.
        loss = sum_losses(_deciding(objective), seen.at(1.0), goal).detach().float()
        bad = ~seen.logits.isfinite().all(1) | loss.isnan()
        return total.masked_fill(bad, torch.inf), loss.masked_fill(bad, torch.inf)


def _deciding(objective: Objective) -> tuple[tuple[Weight, Objective], ...]:
    """The terms whose loss decides between equally unmet constraints: those that are no constraints, or else all."""
    return tuple(term for term in objective.terms() if not term[1].constraint) or objective.terms()
