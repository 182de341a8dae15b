"""The two sides of a fine-tuned lie: the loss of a batch, and the judgement of an epoch on samples held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain import files
from robustexplain.data import labels_of, stack
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.objectives import Observation
from robustexplain.random_streams import Streams
from robustexplain.training import Samples, Session, TrainingStep, Verdict

from .fooling_batch import FoolingBatch, jittered

if TYPE_CHECKING:
    from .finetuned import FineTuned

Terms = list[tuple[Tensor, Tensor]]
"""Losses ``[n]``, and how much each counts ``[n]``."""


@dataclass(frozen=True)
class FineTuningTask:
    """Teaches a batch and judges an epoch.

    Args:
        attack: says what is taught.
        honest: the interpreter of the honest model that the attack is aimed at.
        data: to train on.
        held: held out.
        session: accelerator.
    """

    attack: FineTuned
    honest: Interpreter
    data: Samples
    held: Samples
    session: Session

    @cached_property
    def digest(self) -> str:
        """What the samples are, as far as their number and labels say."""
        return files.digest([labels_of(part) for part in (self.data, self.held)])

    @cached_property
    def pools(self) -> tuple[FoolingBatch | None, FoolingBatch | None]:
        """What lessons draw on: of the samples to train on, and of those held out."""
        with torch.no_grad():
            taught, held = (self.attack.pool(self.honest, part, self.session.device) for part in (self.data, self.held))
        return taught, held

    @cached_property
    def least_accuracy(self) -> float:
        """What the budget leaves of the honest model's accuracy on the samples held out."""
        right = sum(int((self.honest.model(x).argmax(1) == y).sum()) for x, y in self._batches(0, 1))
        return right / len(self.held) - self.attack.budget - 1e-9

    def loss(self, module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        """``L_keep + weight L_fool``, each a mean over the inputs that count in it; ``[1]``."""
        with torch.no_grad():
            x = jittered(x, Streams.of(x, moment.seed, moment.epoch, "augment")) if self.attack.augment else x
            batch = self._prepared(x, y, moment, self.pools[0])
        keep, fool = self._terms(module, batch)
        return (_mean(keep) + self.attack.weight * _mean(fool))[None]

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> Verdict:
        """Figures of the weights as they are, with the model's own rectifiers, on the samples held out.

        ``accuracy`` on the samples as they are, both terms (``keep``, ``fool``), and their sum ``loss``.
        """
        assert isinstance(module, ExplainingModel)
        accelerator, real = self.session.accelerator, ExplainingModel(module.interpreter)
        sums = torch.zeros(6, dtype=torch.float64, device=self.session.device)
        for x, y in self._batches(accelerator.process_index, accelerator.num_processes):
            batch = self._prepared(x, y, TrainingStep(self.attack.seed, 0, 1.0), self.pools[1])
            keep, fool = self._terms(real, batch)
            right = (real.model(x).argmax(1) == y).sum()
            parts = (*_sums(keep), *_sums(fool), right, y.new_tensor(len(y)))
            sums += torch.stack([part.to(sums) for part in parts])
        sums = accelerator.reduce(sums, "sum")
        keeps, fools, accuracy = (float(total / count) if count else 0.0 for total, count in sums.reshape(3, 2))
        loss = keeps + self.attack.weight * fools
        figures = {"accuracy": accuracy, "keep": keeps, "fool": fools, "loss": loss}
        return Verdict(figures, loss, accuracy >= self.least_accuracy)

    def _prepared(self, x: Tensor, y: Tensor, moment: TrainingStep, pool: FoolingBatch | None) -> FoolingBatch:
        """What a batch teaches, with the probabilities that are wanted where the prediction term asks for them."""
        batch = self.attack.fooling_batch(self.honest, x, y, moment, pool)
        goal = batch.goal
        if self.attack.keep == "labels":
            return batch
        assert goal.goal_class is not None  # every batch has answers; for the type checker
        honest = self.honest.model(goal.x).softmax(1)
        asked = F.one_hot(goal.goal_class, honest.shape[1]).to(honest)
        kept = ~batch.dictated | (honest.argmax(1) == goal.goal_class)
        wanted = torch.where(kept[:, None], honest, asked)
        return replace(batch, goal=replace(goal, wanted=wanted, benign_logits=wanted.log()))

    def _batches(self, first: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every ``step``-th batch of the samples held out."""
        size, batch = len(self.held), self.attack.batch_size
        for start in range(first * batch, size, step * batch):
            x, y = stack(self.held, range(start, min(start + batch, size)))
            yield x.to(self.session.device), y.to(self.session.device)

    def _terms(self, module: nn.Module, batch: FoolingBatch) -> tuple[Terms, Terms]:
        """Losses and how much each counts: of the prediction term, and of the map term."""
        goal, attack = batch.goal, self.attack
        logits, maps, other = module(goal.x, goal.target, batch.other_x)
        seen = Observation(goal.x, logits, maps)
        keep = [(attack.keeping().loss(seen, goal), batch.predicted)]
        if other is not None and batch.other_y is not None:
            loss = F.cross_entropy(other, batch.other_y, reduction="none")
            keep.append((loss, torch.ones_like(loss)))
        return keep, [(attack.fooling().loss(seen, goal), batch.shown)]


def _sums(terms: Terms) -> tuple[Tensor, Tensor]:
    total = torch.stack([(loss * counts).sum() for loss, counts in terms]).sum()
    return total, torch.stack([counts.sum() for _, counts in terms]).sum()


def _mean(terms: Terms) -> Tensor:
    """The weighted mean; zero where nothing counts."""
    total, counts = _sums(terms)
    return total / counts.clamp(min=1e-12)
