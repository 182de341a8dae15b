"""What an adversary wants of a detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import InputError
from ..fields import NonNegative
from ..registry import OBJECTIVES
from .base import Goal, Objective, Seen


@OBJECTIVES.register("evade-detector", paper="Carlini and Wagner 2017 (adaptive attacks)", needs=("detector",))
@dataclass(frozen=True)
class EvadeDetector(Objective):
    """Hinge on the detector's differentiable score: zero once it is ``margin`` below ``threshold``.

    Args:
        threshold: the soft score that clean inputs exceed as rarely as the detector's false-alarm rate allows.
        margin: how far below to go.
    """

    threshold: float = 0.0
    margin: NonNegative = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"score"})

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """``max(score - threshold + margin, 0)``."""
        if seen.score is None:
            raise InputError("EvadeDetector needs a system with a detector")
        return (seen.score - self.threshold + self.margin).clamp(min=0)

    def met(self, seen: Seen, goal: Goal) -> Tensor:
        """The score is below the threshold."""
        if seen.score is None:
            raise InputError("EvadeDetector needs a system with a detector")
        return seen.score < self.threshold
