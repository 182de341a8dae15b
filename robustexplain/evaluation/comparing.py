"""Two runs against each other: which figures changed beyond chance, and what was changed to make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..errors import InputError
from ..random_streams import derive
from .differences import Difference, difference, holm
from .doubts import Doubts, doubts
from .exports import WORST
from .results import Results
from .statistics import defined, resampled_means
from .store import RunFolder
from .summaries import SHARES
from .worst import CHANCE, Arrays, arrays_of, headline, worst_case


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Args:
        row: label.
        column: label, or ``worst case``: over the attackers that both runs have.
        before: the value in the first run.
        after: in the second.
        found: second minus first, with interval and p-value.
        paired: whether both are of the same inputs.
        remade: what stands under the same label and was made otherwise: ``row``, ``column``.
        doubted: whether either is in doubt.
        p: corrected for all figures that are compared.
    """

    row: str
    column: str
    before: float
    after: float
    found: Difference
    paired: bool
    remade: tuple[str, ...]
    doubted: bool
    p: float | None = None

    @property
    def beyond_chance(self) -> bool:
        """Whether the corrected test calls it a change."""
        return self.p is not None and self.p < CHANCE


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what not.

    Args:
        measure: what is compared.
        changes: every figure that both have.
        alone: labels of rows and columns that one of them has: ``rows of the first``, ...
        settings: what differs in recipes, versions and data: its name, before, after.
    """

    measure: str
    changes: tuple[Change, ...]
    alone: dict[str, list[str]]
    settings: tuple[tuple[str, Any, Any], ...]


@dataclass(frozen=True, eq=False)
class Side:
    """One of the runs, read."""

    results: Results
    arrays: Arrays
    doubts: Doubts

    @classmethod
    def read(cls, folder: RunFolder) -> Side:
        """From its directory."""
        results = Results.read(folder)
        return cls(results, arrays_of(results, folder), doubts(results))


def compare(first: Side, second: Side, measure: str | None = None) -> Comparison:
    """Every figure that two runs share, compared; paired where the inputs are the same, Holm-corrected.

    Args:
        first: the run before.
        second: the run after.
        measure: a measure of every sample, such as ``l1``; default the one that both reports begin with.

    Raises:
        InputError: nothing that both measured.
    """
    same_data = first.results.run["data"] == second.results.run["data"]
    mains = {headline(side.results) for side in (first, second)}
    name = measure or (mains.pop() if len(mains) == 1 else "joint")
    changes = []
    for where in first.arrays.keys() & second.arrays.keys():
        a, b = first.arrays[where], second.arrays[where]
        if name in a and name in b and a[name].dim() == 1:
            remade, why = _remade(first, second, where), where in first.doubts or where in second.doubts
            changes.append(_change(where, a, b, name, same_data, remade, why))
    if measure is None:
        changes += _worst(first, second, same_data)
    if not changes:
        raise InputError(f"the runs have no figure in common: no cell of the same labels measures {name!r} in both")
    places = [
        [r.label for r in first.results.experiment.rows],
        [WORST, *(c.label for c in first.results.experiment.columns)],
    ]
    changes.sort(key=lambda change: (places[0].index(change.row), places[1].index(change.column)))
    return Comparison(
        name, _corrected(changes), _alone(first.results, second.results), _settings(first.results, second.results)
    )


def _worst(first: Side, second: Side, same_data: bool) -> list[Change]:
    """The worst case of rows over the attackers that both runs have."""
    shared = {c.label for c in second.results.experiment.columns}
    made = []
    for row in first.results.experiment.rows:
        cases = []
        for side in (first, second):
            if row.label in {r.label for r in side.results.experiment.rows}:
                own = side.results.experiment
                common = {c.label for c in first.results.experiment.columns} & shared
                both = [w for w in common if all((row.label, w) in s.arrays for s in (first, second))]
                columns = [c for c in own.columns if c.label in both and not c.facts.clean]
                cases.append(worst_case(side.results, side.arrays, side.doubts, own.row(row.label), columns))
        if len(cases) == 2 and cases[0] is not None and cases[1] is not None:
            a, b = ({"sample": case.samples, WORST: case.values} for case in cases if case is not None)
            doubted = bool(cases[0].doubted or cases[1].doubted)
            made.append(_change((row.label, WORST), a, b, WORST, same_data, (), doubted))
    return made


def _change(
    where: tuple[str, str], a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str, same_data: bool,
    remade: tuple[str, ...], doubted: bool,
) -> Change:  # fmt: skip
    binary = name in SHARES or name == WORST
    (ids, before), (others, after) = (_ordered(side, name) for side in (a, b))
    paired = same_data and torch.equal(ids, others)
    found = difference(after, before, binary) if paired else unpaired(after, before, binary)
    return Change(*where, float(before.nanmean()), float(after.nanmean()), found, paired, remade, doubted)


def _ordered(arrays: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    order = arrays["sample"].argsort()
    return arrays["sample"][order], arrays[name].double()[order]


def unpaired(values: Tensor, reference: Tensor, binary: bool, resamples: int = 2000, seed: int = 0) -> Difference:
    """The difference of two measures of different samples, with its 95% interval and p-value.

    Shares: Newcombe's hybrid score interval (1998, method 10) and Fisher's exact test. Means: both by bootstrap of each
    side, and a permutation test.
    """
    mine, other = defined(values), defined(reference)
    if not len(mine) or not len(other):
        return Difference(None, None, None, 0, None)
    gap = float(mine.mean() - other.mean())
    if binary and np.isin(np.concatenate([mine, other]), (0, 1)).all():
        counts = [[int(side.sum()), len(side) - int(side.sum())] for side in (mine, other)]
        (p1, l1, u1), (p2, l2, u2) = _wilson(mine), _wilson(other)
        low = gap - ((p1 - l1) ** 2 + (u2 - p2) ** 2) ** 0.5
        high = gap + ((u1 - p1) ** 2 + (p2 - l2) ** 2) ** 0.5
        return Difference(gap, low, high, len(mine), float(scipy.stats.fisher_exact(counts)[1]))
    drawn = resampled_means(mine, resamples, derive(seed, "a")) - resampled_means(other, resamples, derive(seed, "b"))
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    random = np.random.default_rng(derive(seed, "permutations"))
    test = scipy.stats.permutation_test(
        (mine, other), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, n_resamples=9999, rng=random
    )
    return Difference(gap, low, high, len(mine), float(test.pvalue))


def _wilson(values: np.ndarray) -> tuple[float, float, float]:
    found = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(0.95, "wilson")
    return float(values.mean()), float(found.low), float(found.high)


def _corrected(changes: list[Change]) -> tuple[Change, ...]:
    corrected = iter(holm([change.found.p for change in changes if change.found.p is not None]))
    return tuple(replace(c, p=None if c.found.p is None else next(corrected)) for c in changes)


def _remade(first: Side, second: Side, where: tuple[str, str]) -> tuple[str, ...]:
    cells = [side.results.cells[where] or {} for side in (first, second)]
    a, b = (cell.get("made_of", {}) for cell in cells)
    return tuple(part for part in ("row", "column") if a.get(part) != b.get(part))


def _alone(first: Results, second: Results) -> dict[str, list[str]]:
    found = {}
    for what, of in (("rows", lambda r: r.experiment.rows), ("columns", lambda r: r.experiment.columns)):
        a, b = ([part.label for part in of(side)] for side in (first, second))
        found[f"{what} of the first alone"] = [label for label in a if label not in b]
        found[f"{what} of the second alone"] = [label for label in b if label not in a]
    return {what: labels for what, labels in found.items() if labels}


def _settings(first: Results, second: Results) -> tuple[tuple[str, Any, Any], ...]:
    pairs = []
    sides = []
    for side in (first, second):
        known = {key: side.run.get(key) for key in ("version", "data", "seed", "precision", "device")}
        known["torch"] = side.run.get("libraries", {}).get("torch")
        sides.append({**known, **_flat(side.experiment.source, "recipe")})
    a, b = sides
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key) and key not in ("recipe.name", "recipe.about", "recipe.seed"):
            pairs.append((key, a.get(key), b.get(key)))
    return tuple(pairs)


def _flat(tree: Any, path: str) -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}").items()}
    if isinstance(tree, list) and any(isinstance(value, (dict, list)) for value in tree):
        return {k: v for i, value in enumerate(tree) for k, v in _flat(value, f"{path}[{i}]").items()}
    return {path: tree}
