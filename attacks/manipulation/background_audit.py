"""Statistical tests of a background sample that somebody else drew, from the model's outputs on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.random_streams import derive
from robustexplain.system import System

from .tabular import model_outputs

Floats = NDArray[np.float64]


class BackgroundAudit(NamedTuple):
    """The result of testing samples that are claimed to be uniform draws."""

    detected: bool
    """Whether any test rejects uniformity at its level."""
    ks: float
    """Smallest p-value of the Kolmogorov-Smirnov tests."""
    wald: float
    """Smallest p-value of the Wald tests."""


def audit_outputs(
    pairs: Sequence[tuple[Floats, Floats]], level: float = 0.01, *, rounds: int = 2, seed: int = 0
) -> BackgroundAudit:
    """Test whether samples were drawn uniformly, from the model's outputs alone (Laberge et al. 2023, algorithm 1).

    For each pair, ``rounds`` Kolmogorov-Smirnov tests against fresh uniform draws (with replacement, as many as the
    sample) and one Wald test of the mean. The levels are Bonferroni's: half of ``level`` goes to all KS tests together,
    half to all Wald tests: with two pairs and two rounds ``level / 8`` and ``level / 4`` each, as published.

    Args:
        pairs: outputs on a sample ``[M]`` and on the population that it is claimed to come from ``[N]``.
        level: share of honest samples that may be called fraud.
        rounds: fresh draws per pair.
        seed: of these draws.

    Raises:
        InputError: no pairs, or an empty sample or population.
    """
    from scipy.stats import ks_2samp, norm  # type: ignore[import-untyped]

    if not pairs or any(not len(sample) or not len(population) for sample, population in pairs):
        raise InputError("an audit needs at least one sample and its population, neither of them empty")
    rng = np.random.default_rng(derive(seed, "audit"))
    ks, wald = [], []
    for sample, population in pairs:
        for _ in range(rounds):
            fresh = population[rng.integers(len(population), size=len(sample))]
            ks.append(float(ks_2samp(sample, fresh).pvalue))
        shift, spread = abs(float(sample.mean() - population.mean())), float(population.std())
        z = np.sqrt(len(sample)) * shift / spread if spread > 0 else (np.inf if shift > 1e-12 else 0.0)
        wald.append(float(2 * norm.sf(z)))
    found = min(ks) < level / (2 * len(ks)) or min(wald) < level / (2 * len(wald))
    return BackgroundAudit(found, min(ks), min(wald))


def audit_background(
    system: System,
    population: Tensor,
    foreground: tuple[Tensor, Tensor] | None = None,
    *,
    of_class: int = 1,
    level: float = 0.01,
    seed: int = 0,
) -> BackgroundAudit:
    """Test whether the background of a system's interpreter is a uniform sample of ``population``.

    Args:
        system: its interpreter has a background.
        population: rows ``[N, D]`` that the background is claimed to come from.
        foreground: the rows that are explained and their population, to be tested too.
        of_class: whose probability is compared.
        level: share of honest samples that may be called fraud.
        seed: of the auditor's own draws.

    Raises:
        InputError: an interpreter without a background.
    """
    background = getattr(system.interpreter, "background", None)
    if background is None:
        raise InputError(f"{type(system.interpreter).__name__} keeps no background: there is nothing to audit")
    rows = [(background.x, population), *([foreground] if foreground else [])]
    pairs = [(outputs(system, sample, of_class), outputs(system, all_rows, of_class)) for sample, all_rows in rows]
    return audit_outputs(pairs, level, seed=seed)


def outputs(system: System, x: Tensor, of_class: int) -> Floats:
    """``[N]`` float64: the probability of a class for rows ``[N, D]``."""
    found = model_outputs(system.model, x).double().softmax(1)[:, of_class]
    return np.asarray(found.numpy(), dtype=np.float64)
