"""Which iterate is best, and whether a search got anywhere: both judged on the real system."""

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
    """What a search keeps an eye on, one entry a sample of the whole batch.

    Args:
        queries: inputs shown to the system so far.
        zero_direction: where there was no direction to go in.
        followed: the loss as a stand-in that was followed saw it first (infinite where none was), and ...
        reached: the lowest it saw since.
    """

    queries: Tensor
    zero_direction: Tensor
    followed: Tensor
    reached: Tensor

    @classmethod
    def none(cls, x: Tensor) -> SearchRecord:
        """Before the first look."""
        far = torch.full((len(x),), torch.inf, device=x.device)
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(count, count > 0, far, far.clone())

    def follow(self, rows: Rows, loss: Tensor, *, first: bool) -> None:
        """Note the loss that a stand-in saw on its way."""
        loss = loss.float()
        if first:
            before = self.followed[rows]
            self.followed[rows] = torch.where(before.isinf(), loss, before)
        self.reached[rows] = torch.minimum(self.reached[rows], loss)

    def verdict(self, best: BestIterates) -> tuple[Tensor, Tensor]:
        """``stalled`` and ``surrogate_misled``, ``[B]`` bool: see :class:`~.loop.SearchResult`."""
        stalled = best.stalled()
        # Infinite throughout where no stand-in was followed.
        fell = self.reached < self.followed - 1e-3 * self.followed.abs()
        return stalled, stalled & fell


class _Start(NamedTuple):
    """The first look at the real system: whatever beats it is a gain."""

    unmet: Tensor
    score: Tensor
    least: float
    """The loss at which nothing is left to gain."""
    alone: bool
    """Whether there are constraints alone, so that nothing is left to want of a sample that meets them."""

    def beaten(self, unmet: Tensor, score: Tensor) -> Tensor:
        """Where constraints came to be met, whatever became of the rest, or the loss fell and gave none of them up."""
        gained = (unmet < self.unmet) | ((unmet == self.unmet) & (score < self.score))
        return gained | (unmet == 0) if self.alone else gained


@dataclass
class BestIterates:
    """Per sample, the best iterate so far: nearest to meeting every constraint, then the lowest score."""

    x: Tensor
    unmet: Tensor
    score: Tensor
    gained: Tensor
    """Where a search that returns its last iterate had got somewhere before that one."""
    start: _Start | None = None

    @classmethod
    def none(cls, x: Tensor) -> BestIterates:
        """Before the first look."""
        far = torch.full((len(x),), torch.inf, device=x.device)
        return cls(x.clone(), far, far.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def update(
        self, rows: Rows, seen: Observation, goal: Goal, objective: Objective, *, always: bool = False
    ) -> Tensor:
        """Take over what is better (``always``: whatever it is); where all constraints are met, ``[rows]`` bool.

        The first look is at all samples.
        """
        unmet, score = rank(objective, seen, goal)
        if self.start is None:
            alone = all(part.constraint for _, part in objective.terms())
            self.start = _Start(unmet, score, sum(part.least for _, part in _deciding(objective)), alone)
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
        """Where nothing that was seen beats the first look, and something was left to gain, ``[B]`` bool."""
        if self.start is None:
            return torch.ones_like(self.gained)
        gained = self.gained | self.start.beaten(self.unmet, self.score)
        return (self.start.score > self.start.least) & ~gained


def _put(old: Tensor, rows: Rows, new: Tensor) -> Tensor:
    """``old`` with ``new`` in some rows; ``new`` itself, if it is about all of them."""
    if isinstance(rows, slice):
        return new
    old[rows] = new
    return old


def rank(objective: Objective, seen: Observation, goal: Goal) -> tuple[Tensor, Tensor]:
    """Unmet constraints and the loss that decides among equals (weights as they are at the end of the search)."""
    with torch.no_grad():
        unmet = [part.unmet(seen, goal) for _, part in objective.terms() if part.constraint]
        far = sum(unmet[1:], unmet[0]) if unmet else torch.zeros(len(seen.x), device=seen.x.device)
        # A loss that was followed, and noted, comes with its graph.
        return far, sum_losses(_deciding(objective), seen.at(1.0), goal).detach().float()


def _deciding(objective: Objective) -> tuple[tuple[Weight, Objective], ...]:
    """The parts whose loss decides among iterates that meet as many constraints."""
    return tuple(term for term in objective.terms() if not term[1].constraint) or objective.terms()
