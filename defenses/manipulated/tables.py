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

    A permutation test: the largest standardised distance between the background and the auditor's rows of the means of
    the columns, of the model's probabilities and decisions, and of the products of these with columns; against that of
    ``draws`` divisions of all these rows, at random, in parts of the same sizes. The p-value is exact for an honest
    sample, whatever the model is, and needs no honest models; where the auditor's rows hold those of the background it
    is too large, if anything. Products are there because a biased sample keeps the columns and the outputs, and changes
    which rows have which output. Give it rows from where the background is said to be drawn: those of one group, where
    the audit compares groups. They need not be the same rows.

    Figures: ``p``; ``column`` (the one whose mean or product is farthest, -1 for an output); ``ks`` and ``wald``, the
    smallest p-values of the published tests, which see the probabilities only.

    Args:
        draws: divisions that the background's is compared with.
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
        spread = features.std(0)
        varies = spread > 1e-12 * np.maximum(1, np.abs(features).max(0))
        scale = np.where(varies, spread, np.inf) * np.sqrt(1 / len(sample) + 1 / len(x))
        found = _apart(features, np.arange(len(sample))) / scale
        rng = np.random.default_rng(derive(self.seed, "background-check"))
        fair = np.empty(self.draws)
        for i in range(self.draws):
            rows = rng.permutation(len(features))[: len(sample)]
            fair[i] = np.max(_apart(features, rows) / scale)
        # Equal divisions must not differ by rounding.
        p = float((1 + (fair >= found.max() - 1e-9).sum()) / (self.draws + 1))
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


def _apart(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``[F]``: how far the means of some rows are from those of the others."""
    inside, total = features[rows].sum(0), features.sum(0)
    return np.asarray(np.abs(inside / len(rows) - (total - inside) / (len(features) - len(rows))))


@torch.no_grad()
def _features(system: System, x: Tensor, sample: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of sample and population, one after the other: what is compared ``[M + N, F]``, and probabilities."""
    rows = torch.cat([sample, x])
    logits = answer(system.model, rows).double()
    outputs = logits.softmax(1)[:, 1:]
    decided = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])[:, 1:].double()
    wide = rows.double()
    middle, std = wide.mean(0), wide.std(0, correction=0)
    columns = (wide - middle) / torch.where(std > 0, std, 1.0)
    both = torch.cat([outputs, decided], 1)
    centred = both - both.mean(0)
    blocks = [columns, *(torch.cat([o[:, None], o[:, None] * columns], 1) for o in centred.T)]
    return torch.cat(blocks, 1).cpu().numpy(), outputs.cpu().numpy()
