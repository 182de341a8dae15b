"""Two runs against each other: which figures changed beyond chance, and what was changed to make them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..errors import InputError
from ..random_streams import derive
from ..recipe.experiment import Column, Row
from .differences import Difference, difference, holm, inverted, over_seeds_difference
from .doubts import Doubts, doubts
from .ranking import CHANCE, Arrays, WorstCase, worst_case
from .results import Results
from .seeds import repeats, stacked
from .statistics import UNBOUNDED, UNIT, defined, drawn_means, measured, resampled_means
from .store import RunFolder
from .summaries import SHARES
from .worst import DRAWS, WORST, attackers, cells_of

Seeds = Mapping[int, tuple[Tensor, Tensor]]
"""Samples ``[N]`` and their values ``[N]``, by the number of the seed."""


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
        seeds: over how many trainings, those that both runs have; 1: of another training nothing is known.
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
    seeds: int = 1
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
        title: the same in words.
        changes: every figure that both have.
        alone: labels of rows and columns that one of them has: ``rows of the first``, ...
        settings: what differs in recipes, versions and data: its name, before, after.
    """

    measure: str
    title: str
    changes: tuple[Change, ...]
    alone: dict[str, list[str]]
    settings: tuple[tuple[str, Any, Any], ...]


@dataclass(frozen=True, eq=False)
class Side:
    """One of the runs.

    Args:
        results: read from it.
        seeds: the arrays of its cells, by the number of each seed.
        doubts: of its cells.
    """

    results: Results
    seeds: Mapping[int, Arrays]
    doubts: Doubts

    @classmethod
    def read(cls, folder: RunFolder) -> Side:
        """From its directory."""
        results = Results.read(folder)
        rows, columns = results.experiment.rows, results.experiment.columns
        seeds = {
            i: {(row.label, label): arrays for row in rows for label, arrays in cells_of(part, row, columns).items()}
            for i, part in enumerate(repeats(results.experiment, folder))
        }
        return cls(results, seeds, doubts(results))

    def cells(self, where: tuple[str, str], name: str) -> Seeds:
        """A cell's measure under every seed that has it."""
        known = {i: arrays[where] for i, arrays in self.seeds.items() if where in arrays}
        return {i: (a["sample"], a[name].double()) for i, a in known.items() if name in a and a[name].dim() == 1}

    def worst(self, row: str, labels: Collection[str]) -> WorstCase | None:
        """A row's worst case over some of its columns."""
        columns = [c for c in attackers(self.results.experiment) if c.label in labels]
        return worst_case(self.results, self.seeds, self.doubts, self.results.experiment.row(row), columns)


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
    mains = {side.results.main for side in (first, second)}
    name = measure or (mains.pop() if len(mains) == 1 else "joint")
    rows, columns = ([part.label for part in of] for of in _parts(first.results))
    changes = []
    for where in product(rows, columns):
        a, b = first.cells(where, name), second.cells(where, name)
        if a.keys() & b.keys():
            remade, doubted = _remade(first, second, where), where in first.doubts or where in second.doubts
            changes.append(_change(where, (a, b), name in SHARES, same_data, remade, doubted))
    if measure is None:
        changes += _worst(first, second, same_data)
    if not changes:
        raise InputError(f"the runs have no figure in common: no cell of the same labels measures {name!r} in both")
    order = [WORST, *columns]
    changes.sort(key=lambda change: (rows.index(change.row), order.index(change.column)))
    words = first.results.words.get(name)
    known = _alone(first.results, second.results), _settings(first.results, second.results)
    return Comparison(name, words.title if words else name, _corrected(changes), *known)


def _worst(first: Side, second: Side, same_data: bool) -> list[Change]:
    """The worst case of rows over the attackers that both runs have."""
    (rows, columns), (others, theirs) = (_parts(side.results) for side in (first, second))
    made = []
    for row in (row.label for row in rows if row.label in {other.label for other in others}):
        shared = {c.label for c in columns} & {c.label for c in theirs}
        common = [c for c in shared if all((row, c) in side.seeds[0] for side in (first, second))]
        cases = [side.worst(row, common) for side in (first, second)]
        if cases[0] is not None and cases[1] is not None:
            a, b = ({i: (v["sample"], v["worst"]) for i, v in c.worst.several.items()} for c in cases if c is not None)
            if a.keys() & b.keys():
                doubted = bool(cases[0].doubted or cases[1].doubted)
                made.append(_change((row, WORST), (a, b), True, same_data, (), doubted))
    return made


def _parts(results: Results) -> tuple[tuple[Row, ...], tuple[Column, ...]]:
    return results.experiment.rows, results.experiment.columns


def _change(
    where: tuple[str, str], sides: tuple[Seeds, Seeds], binary: bool, same_data: bool, remade: tuple[str, ...],
    doubted: bool,
) -> Change:  # fmt: skip
    common = sorted(sides[0].keys() & sides[1].keys())
    before, after = ([_ordered(*side[i]) for i in common] for side in sides)
    paired = same_data and all(torch.equal(a["sample"], b["sample"]) for a, b in zip(before, after, strict=True))
    means = [float(torch.stack([v["value"].nanmean() for v in side]).nanmean()) for side in (before, after)]
    if len(common) > 1:
        found = _of_seeds(after, before, paired, binary)
    else:
        a, b = (side[0]["value"] for side in (after, before))
        found = difference(a, b, binary) if paired else unpaired(a, b, binary)
    return Change(*where, means[0], means[1], found, paired, remade, doubted, len(common))


def _of_seeds(
    after: Sequence[dict[str, Tensor]], before: Sequence[dict[str, Tensor]], paired: bool, binary: bool
) -> Difference:
    """Over seeds and samples: of the same samples seed by seed, else by a bootstrap of each side."""
    bounds = UNIT if binary else UNBOUNDED
    if paired:
        gaps = [{**a, "value": a["value"] - b["value"]} for a, b in zip(after, before, strict=True)]
        return over_seeds_difference(stacked(gaps, "value"), DRAWS, bounds=bounds, binary=binary)
    arrays = [measured(stacked(side, "value")) for side in (after, before)]
    if not all(array.size for array in arrays):
        return Difference(None, None, None, 0, None)
    drawn = drawn_means(arrays[0], DRAWS, derive(0, "a")) - drawn_means(arrays[1], DRAWS, derive(0, "b"))
    width = bounds[1] - bounds[0]
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]).clip(-width, width))
    gap = float(np.nanmean(arrays[0], 1).mean() - np.nanmean(arrays[1], 1).mean())
    return Difference(gap, low, high, arrays[0].shape[1], inverted(drawn))


def _ordered(sample: Tensor, values: Tensor) -> dict[str, Tensor]:
    order = sample.argsort()
    return {"sample": sample[order], "value": values.double()[order]}


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
    batch = max(1, int(4e6) // (len(mine) + len(other)))  # permutations that are in memory at once
    test = scipy.stats.permutation_test(
        (mine, other), _gap_of_means, vectorized=True, n_resamples=9999, batch=batch, rng=random
    )
    return Difference(gap, low, high, len(mine), float(test.pvalue))


def _gap_of_means(mine: np.ndarray, other: np.ndarray, axis: int) -> Any:
    return mine.mean(axis) - other.mean(axis)


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
