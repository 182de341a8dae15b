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
from .scan_evasion import ScanEvasion, Watched

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

    @property
    def evasion(self) -> ScanEvasion | None:
        """What keeps the scans quiet that the attack evades; ``None`` if it evades none."""
        attack = self.attack
        return ScanEvasion(self.honest, attack.evade, attack.seed) if attack.evade else None

    @cached_property
    def least_accuracy(self) -> float:
        """The honest model's accuracy on the held-out samples, minus the budget."""
        correct = sum(int((answer(self.honest.model, x).argmax(1) == y).sum()) for x, y in self._batches(0, 1))
        return correct / len(self.held) - self.attack.budget - 1e-9

    def loss(self, module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        """``L_keep + weight L_fool + evade_weight L_scans``, each a weighted mean over the inputs; ``[1]``."""
        with torch.no_grad():
            x = jittered(x, Streams.of(x, moment.seed, moment.epoch, "augment")) if self.attack.augment else x
            batch = self._batch(x, y, moment, self.pools[0])
        watched = self.evasion.watched(x, y, moment.epoch) if self.evasion else None
        terms = self._terms(module, batch, watched)
        return sum((w * _mean(part) for w, part in zip(self._weights, terms, strict=True) if part), x.new_zeros(1))

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> Verdict:
        """Figures of the current weights on the held-out samples, with the model's own rectifiers.

        ``accuracy`` on the unchanged samples, the terms (``keep``, ``fool``, and ``scans`` where some are evaded), and
        ``loss``, their weighted sum.
        """
        assert isinstance(module, ExplainingModel)
        accelerator, real = self.session.accelerator, ExplainingModel(module.interpreter)
        sums = torch.zeros(4, 2, dtype=torch.float64, device=self.session.device)
        for x, y in self._batches(accelerator.process_index, accelerator.num_processes):
            batch = self._batch(x, y, TrainingStep(self.attack.seed, 0, 1.0), self.pools[1])
            terms = self._terms(real, batch, self.evasion.watched(x, y, 0) if self.evasion else None)
            correct = (answer(real.model, x).argmax(1) == y).to(sums)
            counted = (*terms, [(correct, torch.ones_like(correct))])
            sums += torch.stack([torch.stack([v.to(sums) for v in _sums(part)]) for part in counted])
        sums = accelerator.reduce(sums, "sum")
        *found, accuracy = (float(total / count) if count else 0.0 for total, count in sums)
        loss = sum(w * figure for w, figure in zip(self._weights, found, strict=True))
        names = ("keep", "fool", "scans")[: 3 if self.evasion else 2]
        figures = {"accuracy": accuracy, **dict(zip(names, found, strict=False)), "loss": loss}
        return Verdict(figures, loss, accuracy >= self.least_accuracy)

    @property
    def _weights(self) -> tuple[float, float, float]:
        return 1.0, self.attack.weight, self.attack.evade_weight

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

    def _terms(self, module: nn.Module, batch: FoolingBatch, watched: Watched | None) -> tuple[Terms, Terms, Terms]:
        """Losses and weights of the prediction term, of the map term, and of the scans that are evaded."""
        goal = batch.goal
        if watched is None:
            return *self._fooling_terms(batch, *module(goal.x, goal.target, batch.other_x)), []
        assert self.evasion is not None
        assert goal.target is not None
        size, known = len(goal.x), 0 if batch.other_x is None else len(batch.other_x)
        only = [part for part in (batch.other_x, watched.copies) if part is not None]
        # One pass of the wrapped module holds everything, as data-parallel training needs it.
        explained = watched.begins(goal.x, goal.target)
        x, target = goal.x, goal.target
        if not explained:
            x, target = torch.cat([x, watched.x]), torch.cat([target, watched.target])
        logits, maps, other = module(x, target, torch.cat(only) if only else None)
        seen, copies = (None, None) if other is None else (other[:known], other[known:])
        rows = slice(len(watched.x)) if explained else slice(size, None)
        scans = self.evasion.loss(watched, logits[rows], maps[rows], copies)
        terms = self._fooling_terms(batch, logits[:size], maps[:size], seen)
        return *terms, [(scans, torch.ones_like(scans))]

    def _fooling_terms(
        self, batch: FoolingBatch, logits: Tensor, maps: Tensor, other: Tensor | None
    ) -> tuple[Terms, Terms]:
        goal, attack = batch.goal, self.attack
        seen = Observation(goal.x, logits, maps)
        keep = [(attack.keeping().loss(seen, goal), batch.keep_weight)]
        if other is not None and batch.other_y is not None:
            loss = F.cross_entropy(other, batch.other_y, reduction="none")
            keep.append((loss, torch.ones_like(loss)))
        return keep, [(attack.fooling().loss(seen, goal), batch.fool_weight)]


def _sums(terms: Terms) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses and the sum of the weights; zeros for no terms."""
    if not terms:
        return torch.zeros(()), torch.zeros(())
    total = torch.stack([(loss * weight).sum() for loss, weight in terms]).sum()
    return total, torch.stack([weight.sum() for _, weight in terms]).sum()


def _mean(terms: Terms) -> Tensor:
    """The weighted mean; zero where all weights are zero."""
    total, weight = _sums(terms)
    return total / weight.clamp(min=1e-12)
