"""Manipulated backgrounds for SHAP; the model stays as it is (Laberge et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.features import Feature, index_of
from robustexplain.fields import Count, Fraction, Natural, Positive
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.reference import Reference
from robustexplain.random_streams import derive
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from .background_audit import audit_outputs, outputs
from .base import Manipulation, View
from .shapley import pair_values
from .tabular import as_answered, table_rows
from .transport import biased_weights

Floats = NDArray[np.float64]


class Tried(NamedTuple):
    """One weight ``lambda`` of the distance, and what it leads to."""

    distance_weight: float
    """lambda."""
    weights: Floats
    """``p`` ``[N]``: the probability of each candidate."""
    amplitude: float
    """``|Phi_s|``: mean over the trial samples of the sensitive column's value, in magnitude."""
    detected: float
    """Share of the trial samples that the audit calls fraud."""


class Chosen(NamedTuple):
    """The result of the attack, with all intermediate figures."""

    background: Tensor
    """The background that the auditor gets, ``[size, D]``."""
    foreground: Tensor
    """The rows whose mean explanation was minimised, ``[size, D]``, drawn uniformly."""
    honest: float
    """``|Phi_s|`` with all candidates, each counted once."""
    best: Tried | None
    """The chosen weights; ``None`` if all that were tried are detected: the background is then a uniform draw."""
    tried: tuple[Tried, ...]
    """All that were tried, from the most manipulated to the least."""


@MANIPULATIONS.register("fool-shap", paper="Laberge et al. 2023, section 4", needs=("data", "tabular"))
@dataclass(frozen=True)
class FoolSHAP(Manipulation):
    """Draws SHAP's background so that a sensitive column gets a small value and tests of the outputs detect nothing.

    The audit explains the mean difference in outcome between two groups, foreground rows of one against background
    rows of the other. The column's value ``Phi_s = mean_ij phi_s(f, x_i, z_j)`` is linear in the weights of the
    background, so the best weights for a distance weight ``lambda`` solve a transport problem (:func:`biased_weights`).
    For each ``lambda`` of a logarithmic grid the attack draws ``trials`` backgrounds and audits each as the auditor
    would (:func:`audit_outputs`). It keeps the ``lambda`` of the least amplitude among those detected in less than a
    share ``tolerated`` of the trials. Departures: values of pairs of rows are computed for any model, over all
    coalitions or a sample of them, where the published code patches tree and exact explainers; one column only.

    Args:
        sensitive: the column that divides the groups and whose value is minimised.
        threshold: rows above it are one group, all others the second; default: the column's mean.
        explains_above: whether the rows above are the foreground.
        size: M: rows of the background, and of the foreground sample.
        candidates: largest number of rows of the other group that are weighted.
        coalitions: per pair of rows; where ``2^(D-1)`` is no more than this, all of them, which is exact.
        of_class: whose probability is explained and audited.
        least: smallest lambda.
        most: largest lambda.
        steps: number of lambdas, in equal ratios.
        trials: backgrounds drawn for each lambda.
        level: of the audit: share of honest samples that it may call fraud.
        tolerated: a lambda counts as detected from this share of detected trials on.
        seed: of all draws.

    Raises:
        InputError: too few rows of a group, a column that does not exist, least above most.
        UnsupportedModelError: an interpreter without a background.
    """

    sensitive: Feature = field(kw_only=True)
    threshold: float | None = None
    explains_above: bool = True
    size: Count = 200
    candidates: Count = 500
    coalitions: Count = 128
    of_class: Natural = 1
    least: Positive = 0.05
    most: Positive = 20.0
    steps: Count = 20
    trials: Count = 100
    level: Fraction = 0.01
    tolerated: Fraction = 0.1

    changes: ClassVar[str] = "background"
    attacks: ClassVar[tuple[str, ...]] = ("shap-tabular",)
    columns: ClassVar[tuple[str, ...]] = ("sensitive",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.most:
            raise InputError(f"FoolSHAP.least must not exceed most, got {self.least} and {self.most}")

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # checked before; for the type checker
        checked_interpreter(system)
        return with_background(system, self.choose(system, data).background)

    def choose(self, system: System, data: Samples) -> Chosen:
        """The background, with all intermediate figures.

        Args:
            system: whose model is explained.
            data: gives ``(x [D], label)``: the population of both groups.
        """
        x = table_rows(data)
        above, below = (torch.nonzero(side)[:, 0] for side in self._sides(x))
        explained, others = (above, below) if self.explains_above else (below, above)
        rng = np.random.default_rng(derive(self.seed, "fool-shap"))
        foreground = x[explained[drawn(len(explained), self.size, "foreground", rng)]]
        pool = x[others[drawn(len(others), min(self.candidates, len(others)), "background", rng)]]
        if len(others) < self.size:
            raise InputError(f"a background of {self.size} needs as many rows of the other group, got {len(others)}")
        column = index_of(self.sensitive, width=x.shape[1])
        values = pair_values(system.model, foreground, pool, column, self.of_class, self.coalitions, self.seed).mean(0)
        populations = (outputs(system, x[explained], self.of_class), outputs(system, x[others], self.of_class))
        tried = self._try_all(values, outputs(system, pool, self.of_class), outputs(system, foreground, self.of_class),
                              populations, rng)  # fmt: skip
        undetected = [one for one in tried if one.detected < self.tolerated]
        best = min(undetected, key=lambda one: one.amplitude) if undetected else None
        rows = rng.choice(len(pool), self.size, p=None if best is None else best.weights)
        return Chosen(pool[rows], foreground, abs(float(values.mean())), best, tuple(tried))

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The rows unchanged, with the honest model's predictions."""
        return as_answered(honest, x)

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at, in a few words each, for tables."""
        return self.changes, f"{self.sensitive} hidden"

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        column = x[:, index_of(self.sensitive, width=x.shape[1])]
        above = column > (float(column.double().mean()) if self.threshold is None else self.threshold)
        if not above.any() or above.all():
            raise InputError(f"column {self.sensitive!r} does not divide the rows in two groups: {int(above.sum())} "
                             f"of {len(x)} lie above the threshold")  # fmt: skip
        return above, ~above

    def _try_all(
        self,
        values: Floats,
        pool: Floats,
        foreground: Floats,
        populations: tuple[Floats, Floats],
        rng: np.random.Generator,
    ) -> list[Tried]:
        sign = 1.0 if values.sum() >= 0 else -1.0
        tried = []
        for distance_weight in np.geomspace(self.least, self.most, self.steps):
            weights = biased_weights(sign * values, pool, float(distance_weight))
            total, detected = 0.0, 0
            for trial in range(self.trials):
                rows = rng.choice(len(pool), self.size, p=weights)
                total += float(values[rows].mean())
                pairs = [(foreground, populations[0]), (pool[rows], populations[1])]
                detected += audit_outputs(pairs, self.level, seed=derive(self.seed, "trial", trial)).detected
            amplitude = abs(total) / self.trials
            tried.append(Tried(float(distance_weight), weights, amplitude, detected / self.trials))
        return tried


def drawn(available: int, count: int, what: str, rng: np.random.Generator) -> list[int]:
    """Sorted indices of ``count`` of ``available`` rows, drawn without replacement.

    Raises:
        InputError: if there are fewer.
    """
    if count > available:
        raise InputError(f"the {what} sample needs {count} rows of its group, got {available}")
    return sorted(rng.permutation(available)[:count].tolist())


def checked_interpreter(system: System) -> None:
    """Refuse an interpreter without a background.

    Raises:
        UnsupportedModelError: naming some that do.
    """
    interpreter = system.interpreter
    if not isinstance(getattr(interpreter, "background", None), Reference):
        raise UnsupportedModelError(
            f"{type(interpreter).__name__} keeps no background that could be chosen; shap-tabular, lime-tabular and "
            "expected-gradients do"
        )


def with_background(system: System, rows: Tensor) -> System:
    """The system with ``rows`` ``[M, D]`` as its interpreter's background."""
    assert any(f.name == "background" for f in fields(system.interpreter))
    return replace(system, interpreter=replace(system.interpreter, background=Reference(rows)))  # type: ignore[call-arg]
