"""Which of the weights that a training comes by are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class Verdict(NamedTuple):
    """What is thought of weights: ``figures`` to keep, a ``loss`` to compare by, and whether they may be kept."""

    figures: dict[str, float]
    loss: float
    admissible: bool


@dataclass
class Selection:
    """Which weights a training ends with: of those that are admissible, the ones of the lowest loss.

    The untrained weights take part; they stay where no epoch gives anything better that is admissible.

    Args:
        evaluate: called in every process on the module as it is, before the first epoch and after each; must give all
            of them the same.
        history: the figures, one entry for the untrained weights and one for each epoch; filled as training goes.
        kept: which entry of ``history`` the weights at the end belong to; 0 for the untrained ones.
    """

    evaluate: Callable[[nn.Module], Verdict]
    history: list[dict[str, float]] = field(default_factory=list)
    kept: int = 0
