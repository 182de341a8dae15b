"""Scans of systems that explain tables: is the background a fair sample, do two answers contradict each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustexplain.attacks.manipulation import audit_outputs
from robustexplain.checks import Kind
from robustexplain.data import stack
from robustexplain.door import answer
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.fields import Count
from robustexplain.interpreters import Reference
from robustexplain.metrics import incoherent_pairs
from robustexplain.random_streams import derive, generator
from robustexplain.registry import SCANNERS
from robustexplain.system import System
from robustexplain.training import Samples

from .base import ModelScanner, Scan


@SCANNERS.register("background-check", paper="this project; the tests of the outputs: Laberge et al. 2023, algorithm 1")
@dataclass(frozen=True)
class BackgroundCheck(ModelScanner):
    """Whether the rows that an interpreter keeps as its background are a uniform sample of the auditor's rows.

    A Monte Carlo test: the largest standardised distance between sample and population of the means of the columns, of
    the model's probabilities and decisions, and of the products of these with columns; against that of ``draws``
    uniform samples of the same size. The p-value is exact for an honest sample, whatever the model is, and needs no
    honest models. Products are there because a biased sample keeps the columns and the outputs, and changes which rows
    have which output. Give it the rows that the background is said to be drawn from: those of one group, where the
    audit compares groups.

    Figures: ``p``; ``column`` (the one whose mean or product is farthest, -1 for an output); ``ks`` and ``wald``, the
    smallest p-values of the published tests, which see the probabilities only.

    Args:
        draws: uniform samples that the background is compared with.
        probe: largest number of rows of the population.

    Raises:
        InputError: a background of a single row.
        UnsupportedModelError: an interpreter without a background, one that does not use its own, or one whose
            background has weights: centroids are no sample.
    """

    draws: Count = 999
    probe: Count = field(default=10_000, kw_only=True)

    takes: ClassVar[tuple[Kind, ...]] = ("tables",)

    def _samples(self, data: Samples) -> tuple[Tensor, Tensor]:
        # As they come, not by class: they are the population.
        order = torch.randperm(len(data), generator=generator(self.seed, "population"))
        return stack(data, order[: self.probe].sort().values.tolist())

    def _scan(self, system: System, x: Tensor, y: Tensor, reference: System | None) -> Scan:
        sample = _background(system, x)
        features, outputs = _features(system, x, sample)
        chosen, everyone = features[: len(sample)], features[len(sample) :]
        spread = everyone.std(0)
        varies = spread > 1e-12 * np.maximum(1, np.abs(everyone).max(0))
        far = np.abs(chosen.mean(0) - everyone.mean(0))
        # What all rows of the population share, those of the background must share.
        strange = bool((far[~varies] > 1e-6).any())
        scale = np.where(varies, spread, 1.0) / np.sqrt(len(sample))
        found = np.where(varies, far / scale, 0.0)
        rng = np.random.default_rng(derive(self.seed, "background-check"))
        fair = np.empty(self.draws)
        for i in range(self.draws):
            rows = everyone[rng.integers(len(everyone), size=len(sample))]
            fair[i] = np.max(np.where(varies, np.abs(rows.mean(0) - everyone.mean(0)) / scale, 0.0))
        p = 1 / (self.draws + 1) if strange else float((1 + (fair >= found.max()).sum()) / (self.draws + 1))
        width = x.shape[1]
        column = int(found.argmax())
        # After the columns, each output and its products.
        column = column if column < width else (column - width) % (width + 1) - 1
        pairs = [(outputs[: len(sample), k], outputs[len(sample) :, k]) for k in range(outputs.shape[1])]
        audit = audit_outputs(pairs, seed=self.seed)
        figures = {"p": p, "column": float(column), "ks": audit.ks, "wald": audit.wald}
        return Scan(float(found.max()), figures)


@SCANNERS.register("pairs-probe", paper="Le Merrer and Tredan 2020, section 4")
@dataclass(frozen=True)
class PairsProbe(ModelScanner):
    """Share of pairs of rows that the service decides differently although its explanations do not tell them apart.

    :func:`~robustexplain.metrics.incoherent_pairs` over all pairs of the probe. 0 for a service whose explanations are
    sufficient, such as the path through its own tree; anything above convicts one that claims that. An attribution
    without exact zeros uses every column and always scores 0, and one of zeros alone says that nothing counts: of both
    nothing follows.

    Figures: ``pairs`` tried, ``queries``, and ``chance`` of meeting an incoherent one within 100 pairs.

    Args:
        limit: number of pairs, drawn at random; ``None``: all of the probe.
    """

    limit: Count | None = None

    takes: ClassVar[tuple[Kind, ...]] = ("tables",)

    def _scan(self, system: System, x: Tensor, y: Tensor, reference: System | None) -> Scan:
        found = incoherent_pairs(system, x, limit=self.limit, seed=self.seed)
        figures = {"pairs": float(found.asked), "queries": float(found.queries), "chance": found.chance(100)}
        return Scan(found.share, figures)


def _background(system: System, x: Tensor) -> Tensor:
    interpreter, name = system.interpreter, type(system.interpreter).__name__
    background = getattr(interpreter, "background", None)
    if not isinstance(background, Reference):
        raise UnsupportedModelError(f"{name} keeps no background: there is nothing to check")
    if getattr(interpreter, "generator", None) is not None:
        raise UnsupportedModelError(f"the rows of {name} come from a generator, its background is not used")
    if background.weights is not None:
        raise UnsupportedModelError(
            f"the background of {name} has weights: centroids (shap.kmeans) are no sample, and no test of one applies"
        )
    if len(background.x) < 2:
        raise InputError("a background of one row cannot be tested")
    return background.like(x)


@torch.no_grad()
def _features(system: System, x: Tensor, sample: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of sample and population, one after the other: what is compared ``[M + N, F]``, and probabilities."""
    rows = torch.cat([sample, x])
    logits = answer(system.model, rows).double()
    outputs = logits.softmax(1)[:, 1:]
    decided = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])[:, 1:].double()
    wide = rows.double()
    middle, std = wide[len(sample) :].mean(0), wide[len(sample) :].std(0, correction=0)
    columns = (wide - middle) / torch.where(std > 0, std, 1.0)
    both = torch.cat([outputs, decided], 1)
    centred = both - both[len(sample) :].mean(0)
    blocks = [columns, *(torch.cat([o[:, None], o[:, None] * columns], 1) for o in centred.T)]
    return torch.cat(blocks, 1).cpu().numpy(), outputs.cpu().numpy()
