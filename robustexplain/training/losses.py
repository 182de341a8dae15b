"""What a loss is, and when it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.data import Dataset

Samples = Dataset[tuple[Tensor, int]]


@dataclass(frozen=True)
class TrainingStep:
    """When a loss is computed: what its random streams are derived from."""

    seed: int
    epoch: int
    progress: float


Loss = Callable[[nn.Module, Tensor, Tensor, TrainingStep], Tensor]
"""``loss(module, x, y, step)`` gives ``[b]`` losses; ``module`` is the (perhaps wrapped) module in training."""


def cross_entropy(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
    """Cross-entropy of a classifier, ``[b]``."""
    return nn.functional.cross_entropy(module(x), y, reduction="none")
