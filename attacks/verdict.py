"""Which iterate is best, and whether a search got anywhere: both judged on the real system."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustexplain.objectives import Goal, Objective, Seen, sum_losses


@dataclass
class Progress:
    """What a search keeps an eye on, one entry a sample of the whole batch.

    Args:
        queries: inputs shown to the system so far.
        flat: where the map's gradient was exactly zero.
        first: the loss that decides at the first look at the real system, and ...
        lowest: the lowest since.
        followed: the loss as the followed direction saw it first, and ...
        reached: the lowest it saw since.
        least: the loss at which nothing is left to gain.
    """

    queries: Tensor
    flat: Tensor
    first: Tensor
    lowest: Tensor
    followed: Tensor
    reached: Tensor
    least: float = 0.0

    @classmethod
    def none(cls, x: Tensor) -> Progress:
        """Before the first look."""
        far = torch.full((len(x),), torch.inf, device=x.device)
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(count, count > 0, far.clone(), far.clone(), far.clone(), far)

    def follow(self, rows: Tensor, loss: Tensor, *, first: bool) -> None:
        """Note the loss that a direction saw on its way."""
        loss = loss.float()
        if first:
            new = self.followed[rows].isinf()
            self.followed[rows[new]] = loss[new]
        self.reached[rows] = torch.minimum(self.reached[rows], loss)

    def judged(self, rows: Tensor, loss: Tensor, counts: Tensor) -> None:
        """Note the loss of a look at the real system, where it ``counts``: meets no fewer constraints than before."""
        first, lowest = self.first[rows], self.lowest[rows]
        self.first[rows] = torch.where(first.isinf(), loss, first)
        self.lowest[rows] = torch.where(counts, torch.minimum(lowest, loss), lowest)

    def verdict(self, best: Best) -> tuple[Tensor, Tensor]:
        """``stalled`` and ``misled``, ``[B]`` bool: see :class:`~.search.Found`."""
        stuck = (self.lowest >= self.first) & (self.first > self.least) & ~best.satisfied
        fell = self.reached < self.followed - 1e-3 * self.followed.abs()
        return stuck, stuck & fell


@dataclass
class Best:
    """Per sample, the best iterate so far: nearest to meeting every constraint, then the lowest score."""

    x: Tensor
    unmet: Tensor
    score: Tensor
    satisfied: Tensor

    @classmethod
    def none(cls, x: Tensor) -> Best:
        """Before the first look."""
        far = torch.full((len(x),), torch.inf, device=x.device)
        return cls(x.clone(), far.clone(), far, torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def update(
        self, rows: Tensor, seen: Seen, goal: Goal, objective: Objective, progress: Progress, *, always: bool = False
    ) -> Tensor:
        """Take over what is better (``always``: whatever it is); where all constraints are met, ``[rows]`` bool."""
        unmet, score = rank(objective, seen, goal)
        least, lowest = self.unmet[rows], self.score[rows]
        # An iterate that gives up a constraint (the label) for a lower loss has got nowhere.
        progress.judged(rows, score, unmet <= least)
        nearer = unmet < least
        # A constraint that came to be met is progress, whatever became of the rest.
        self.satisfied[rows] |= nearer & least.isfinite()
        better = nearer | ((unmet == least) & (score < lowest)) | always
        at_rows = rows[better]
        self.x[at_rows] = seen.x.detach()[better]
        self.unmet[rows], self.score[rows] = torch.where(better, unmet, least), torch.where(better, score, lowest)
        progress.least = sum(part.least for part in _deciding(objective))
        if all(part.constraint for _, part in objective.terms()):
            # Nothing is left to want of a sample that meets constraints alone.
            self.satisfied[rows] |= unmet == 0
        return unmet == 0


def rank(objective: Objective, seen: Seen, goal: Goal) -> tuple[Tensor, Tensor]:
    """Unmet constraints and the loss that decides among equals (weights as they are at the end of the search)."""
    with torch.no_grad():
        terms = objective.terms()
        constraints = [part for _, part in terms if part.constraint]
        unmet = sum((part.unmet(seen, goal) for part in constraints), torch.zeros(len(seen.x), device=seen.x.device))
        rest = tuple(t for t in terms if not t[1].constraint) or terms
        return unmet, sum_losses(rest, seen.at(1.0), goal).float()


def _deciding(objective: Objective) -> list[Objective]:
    """The parts whose loss decides among iterates that meet as many constraints."""
    parts = [part for _, part in objective.terms()]
    return [part for part in parts if not part.constraint] or parts
