"""Training of an attack by fine-tuning: the loss of a batch, and the evaluation of an epoch on held-out samples."""

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
from robustexplain.door import answer
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.objectives import Observation
from robustexplain.random_streams import Streams
from robustexplain.training import Samples, Session, TrainingStep, Verdict

from .fooling_batch import FoolingBatch, jittered

if TYPE_CHECKING:
    from .finetuned import FineTuned

Terms = list[tuple[Tensor, Tensor]]
"""Losses ``[n]`` and their weights ``[n]``."""


@dataclass(frozen=True)
class FineTuningTask:
    """The loss of a training batch and the figures of an epoch.

    Args:
        attack: gives targets, losses and weights.
        honest: the attacked interpreter, of the honest model.
        data: training samples.
        held: held-out samples.
        session: its accelerator is used.
    """

    attack: FineTuned
    honest: Interpreter
    data: Samples
    held: Samples
    session: Session

    @cached_property
    def digest(self) -> str:
        """Digest of the samples' number and labels."""
        return files.digest([labels_of(part) for part in (self.data, self.held)])

    @cached_property
    def pools(self) -> tuple[FoolingBatch | None, FoolingBatch | None]:
        """The pools of the training samples and of the held-out samples: see :meth:`FineTuned.pool`."""
        with torch.no_grad():
            train, held = (self.attack.pool(self.honest, part, self.session.device) for part in (self.data, self.held))
        return train, held

    @cached_property
    def least_accuracy(self) -> float:
        """The honest model's accuracy on the held-out samples, minus the budget."""
        correct = sum(int((answer(self.honest.model, x).argmax(1) == y).sum()) for x, y in self._batches(0, 1))
        return correct / len(self.held) - self.attack.budget - 1e-9

    def loss(self, module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        """``L_keep + weight L_fool``, each a weighted mean over the inputs; ``[1]``."""
        with torch.no_grad():
            x = jittered(x, Streams.of(x, moment.seed, moment.epoch, "augment")) if self.attack.augment else x
            batch = self._batch(x, y, moment, self.pools[0])
        keep, fool = self._terms(module, batch)
        return (_mean(keep) + self.attack.weight * _mean(fool))[None]

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> Verdict:
        """Figures of the current weights on the held-out samples, with the model's own rectifiers.

        ``accuracy`` on the unchanged samples, both terms (``keep``, ``fool``), and ``loss = keep + weight * fool``.
        """
        assert isinstance(module, ExplainingModel)
        accelerator, real = self.session.accelerator, ExplainingModel(module.interpreter)
        sums = torch.zeros(6, dtype=torch.float64, device=self.session.device)
        for x, y in self._batches(accelerator.process_index, accelerator.num_processes):
            batch = self._batch(x, y, TrainingStep(self.attack.seed, 0, 1.0), self.pools[1])
            keep, fool = self._terms(real, batch)
            correct = (answer(real.model, x).argmax(1) == y).sum()
            parts = (*_sums(keep), *_sums(fool), correct, y.new_tensor(len(y)))
            sums += torch.stack([part.to(sums) for part in parts])
        sums = accelerator.reduce(sums, "sum")
        keeps, fools, accuracy = (float(total / count) if count else 0.0 for total, count in sums.reshape(3, 2))
        loss = keeps + self.attack.weight * fools
        figures = {"accuracy": accuracy, "keep": keeps, "fool": fools, "loss": loss}
        return Verdict(figures, loss, accuracy >= self.least_accuracy)

    def _batch(self, x: Tensor, y: Tensor, moment: TrainingStep, pool: FoolingBatch | None) -> FoolingBatch:
        """The attack's batch; with target probabilities, unless the prediction term needs labels only."""
        batch = self.attack.fooling_batch(self.honest, x, y, moment, pool)
        return batch if self.attack.keep == "labels" else self._with_probabilities(batch)

    def _with_probabilities(self, batch: FoolingBatch) -> FoolingBatch:
        """Target probabilities: the honest model's; one-hot where a new answer differs from its prediction."""
        goal = batch.goal
        assert goal.goal_class is not None  # every batch has answers; for the type checker
        honest = answer(self.honest.model, goal.x).softmax(1)
        one_hot = F.one_hot(goal.goal_class, honest.shape[1]).to(honest)
        kept = ~batch.new_answer | (honest.argmax(1) == goal.goal_class)
        wanted = torch.where(kept[:, None], honest, one_hot)
        return replace(batch, goal=replace(goal, wanted=wanted, benign_logits=wanted.log()))

    def _batches(self, first: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every ``step``-th batch of the held-out samples, from number ``first`` on."""
        size, batch = len(self.held), self.attack.batch_size
        for start in range(first * batch, size, step * batch):
            x, y = stack(self.held, range(start, min(start + batch, size)))
            yield x.to(self.session.device), y.to(self.session.device)

    def _terms(self, module: nn.Module, batch: FoolingBatch) -> tuple[Terms, Terms]:
        """Losses and weights of the prediction term and of the map term."""
        goal, attack = batch.goal, self.attack
        logits, maps, other = module(goal.x, goal.target, batch.other_x)
        seen = Observation(goal.x, logits, maps)
        keep = [(attack.keeping().loss(seen, goal), batch.keep_weight)]
        if other is not None and batch.other_y is not None:
            loss = F.cross_entropy(other, batch.other_y, reduction="none")
            keep.append((loss, torch.ones_like(loss)))
        return keep, [(attack.fooling().loss(seen, goal), batch.fool_weight)]


def _sums(terms: Terms) -> tuple[Tensor, Tensor]:
    total = torch.stack([(loss * weight).sum() for loss, weight in terms]).sum()
    return total, torch.stack([weight.sum() for _, weight in terms]).sum()


def _mean(terms: Terms) -> Tensor:
    """The weighted mean; zero where all weights are zero."""
    total, weight = _sums(terms)
    return total / weight.clamp(min=1e-12)
