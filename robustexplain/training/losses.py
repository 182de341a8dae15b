"""What a loss is, when it is computed, and the loss of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingStep:
    """When a loss is computed: what its random streams are derived from."""

    seed: int
    epoch: int
    progress: float


Loss = Callable[[nn.Module, Tensor, Tensor, TrainingStep], Tensor]
"""``loss(module, x, y, step)`` gives ``[b]`` losses; ``module`` is the (perhaps wrapped) module in training."""


@runtime_checkable
class ClassifierLoss(Protocol):
    """The loss of a module that gives logits ``[b, K]``: its labels can be smoothed, its weights validated."""

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, /) -> Tensor:
        """``[b]`` losses."""
        ...

    def smoothed(self, label_smoothing: float, /) -> ClassifierLoss:
        """The same with that share of each label's probability spread over all classes."""
        ...

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, /) -> dict[str, Tensor]:
        """How good the weights are on samples held out: ``[b]`` each, larger is better; the last one decides."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of a classifier, ``[b]``; weights are validated by their accuracy.

    Args:
        label_smoothing: share of the label's probability that is spread over all classes.
    """

    label_smoothing: float = 0.0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses."""
        return F.cross_entropy(module(x), y, reduction="none", label_smoothing=self.label_smoothing)

    def smoothed(self, label_smoothing: float) -> CrossEntropy:
        """The same with other labels."""
        return replace(self, label_smoothing=label_smoothing)

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy``: 1 where the answer is right."""
        return {"accuracy": right(module(x), y)}


@dataclass(frozen=True)
class Weighted:
    """A classifier's loss, each sample's times the weight of its class; figures count every sample alike.

    Args:
        loss: the loss.
        weights: by class.
    """

    loss: ClassifierLoss
    weights: tuple[float, ...]

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses."""
        plain = self.loss(module, x, y, step)
        return plain * torch.tensor(self.weights, dtype=plain.dtype, device=plain.device)[y]

    def smoothed(self, label_smoothing: float) -> Weighted:
        """The same with other labels."""
        return replace(self, loss=self.loss.smoothed(label_smoothing))

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """Those of the loss."""
        return self.loss.figures(module, x, y, step)


def balanced(labels: Sequence[int]) -> tuple[float, ...]:
    """Weights by class, ``n / (K n_c)`` for the ``K`` classes among ``n`` labels; 1 for a class that is not there."""
    counts = torch.bincount(torch.tensor(labels)).tolist()
    present = sum(count > 0 for count in counts)
    return tuple(len(labels) / (present * count) if count else 1.0 for count in counts)


def right(logits: Tensor, y: Tensor) -> Tensor:
    """``[b]``: 1 where the largest logit is the label's; 0 where any is not finite (argmax of NaN is class 0)."""
    return ((logits.argmax(1) == y) & logits.isfinite().all(1)).double()


cross_entropy = CrossEntropy()
"""Cross-entropy of a classifier, ``[b]``."""
