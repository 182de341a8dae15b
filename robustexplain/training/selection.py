"""Which of the weights that a training comes by are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.base import Samples, stack, subset
from ..errors import InputError
from ..random_streams import generator
from .losses import ClassifierLoss, TrainingStep
from .session import Session


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
        patience: training stops after so many epochs without better weights; 0 never stops early.
    """

    evaluate: Callable[[nn.Module], Verdict]
    history: list[dict[str, float]] = field(default_factory=list)
    kept: int = 0
    patience: int = 0

    @property
    def exhausted(self) -> bool:
        """Whether training has gone on for as long without better weights as it may."""
        return 0 < self.patience < len(self.history) - self.kept


def held_out(data: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """The samples to train on, and at least one that is held out, in the data's own order.

    Raises:
        InputError: if none is left to train on.
    """
    size = len(data)
    held = max(1, math.floor(share * size))
    if size - held < 1:
        raise InputError(f"Training.validation = {share} of {size} samples leaves none to train on")
    order = torch.randperm(size, generator=generator(seed, "validation")).tolist()
    return subset(data, sorted(order[held:])), subset(data, sorted(order[:held]))


@dataclass(frozen=True)
class Validation:
    """Means of a classifier's figures over samples held out; processes share the work and find the same.

    Args:
        loss: gives the figures; the last one decides.
        held: the samples.
        batch_size: samples a pass.
        seed: of the training.
        session: accelerator.
    """

    loss: ClassifierLoss
    held: Samples
    batch_size: int
    seed: int
    session: Session

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> Verdict:
        """Figures of the weights as they are, in eval mode."""
        sums: dict[str, Tensor] = {}
        for x, y, counts in self._batches():
            for name, values in self.loss.figures(module, x, y, TrainingStep(self.seed, 0, 1.0)).items():
                total = values.double().sum() if counts else torch.zeros_like(values.double().sum())
                sums[name] = sums[name] + total if name in sums else total
        means = self.session.accelerator.reduce(torch.stack(list(sums.values())), "sum") / len(self.held)
        figures = dict(zip(sums, means.tolist(), strict=True))
        return Verdict(figures, -list(figures.values())[-1], True)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """This process's batches; one that does not count where there are fewer than processes."""
        accelerator, device = self.session.accelerator, self.session.device
        starts = range(0, len(self.held), self.batch_size)[accelerator.process_index :: accelerator.num_processes]
        for start in starts or (0,):
            x, y = stack(self.held, range(start, min(start + self.batch_size, len(self.held))))
            yield x.to(device), y.to(device), bool(starts)
