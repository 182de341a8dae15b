"""What a loss is, when it is computed, and the loss of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..answers import with_auxiliary


@dataclass(frozen=True)
class TrainingStep:
    """When a loss is computed: what its random streams are derived from.

    Args:
        seed: of the training.
        epoch: which pass over the data.
        progress: in ``[0, 1]``.
        number: of the optimiser step, counted from 0 over all epochs.
    """

    seed: int
    epoch: int
    progress: float
    number: int = 0


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


AUXILIARY = {1: 0.4, 2: 0.3}
"""By the number of auxiliary heads, the weight of the loss of each: Inception v3's one head, GoogLeNet's two.

0.3: Szegedy et al. 2015, section 5. Szegedy et al. 2016 give no number; 0.4 is that of their code (TF-slim).
"""


def classification_loss(answer: Any, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy ``[b]`` of logits ``[b, K]``, and, weighted, of those of auxiliary heads.

    Args:
        answer: what the module gives in train mode: logits, or an answer with ``logits`` and ``aux...``.
        y: ``[b]``.
        label_smoothing: share of the label's probability that is spread over all classes.
    """

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)

    logits, heads = with_auxiliary(answer)
    total = loss(logits)
    for head in heads:
        total = total + AUXILIARY.get(len(heads), AUXILIARY[2]) * loss(head)
    return total


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of a classifier, ``[b]``; weights are validated by their accuracy.

    In train mode that of auxiliary heads is added (:func:`classification_loss`); evaluation takes the main logits.

    Args:
        label_smoothing: share of the label's probability that is spread over all classes.
    """

    label_smoothing: float = 0.0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses."""
        return classification_loss(module(x), y, self.label_smoothing)

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
