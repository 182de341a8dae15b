"""The repeats of a recipe with ``seeds``: each a run of its own, and cells that sum up all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..data.own import OwnData
from ..random_streams import derive
from ..recipe import check
from ..recipe.experiment import Column, Experiment, Recipe, Row
from .differences import over_seeds_difference
from .statistics import UNBOUNDED, Estimate, of_estimates, over_seeds, shares_over_seeds
from .store import RunFolder
from .summaries import Summaries

AREAS = ("auc", "separation")
"""Measures that are no means over samples."""


def again(recipe: Recipe, repeat: int) -> Recipe:
    """The recipe in which every trained part is made for that time, under other seeds.

    Goals and the order of inputs are the same; with ``only_correct`` each judges those that its classifier gets right.

    Args:
        recipe: the recipe with ``seeds``, columns of tables by their names.
        repeat: 1 for the first time after the one that stands in the run directory itself.
    """
    source = {key: value for key, value in recipe.source.items() if key != "seeds"}
    made = check({**source, "repeat": repeat})
    trusted = recipe.model.trusted or (isinstance(recipe.data, OwnData) and recipe.data.trusted)
    return made.trusting() if trusted else made


def repeats(experiment: Experiment, folder: RunFolder) -> list[RunFolder]:
    """The run directories of an experiment, the first being ``folder`` itself."""
    return [folder.repeat(i) for i in range(experiment.seeds if isinstance(experiment, Recipe) else 1)]


def stacked(several: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """``[S, N]``: a measure of each seed, a column a sample of any; NaN where a seed does not judge the sample."""
    places: dict[int, int] = {}
    for arrays in several:
        for sample in arrays["sample"].tolist():
            places.setdefault(int(sample), len(places))
    found = torch.full((len(several), len(places)), torch.nan, dtype=torch.float64)
    for i, arrays in enumerate(several):
        if name in arrays:
            found[i, [places[int(s)] for s in arrays["sample"].tolist()]] = arrays[name].double()
    return found


def over_all(
    values: Tensor, binary: bool, resamples: int, seed: int, bounds: tuple[float, float] = UNBOUNDED
) -> dict[str, Any]:
    """An estimate over seeds and samples ``[S, N]`` as plain data, with each seed's value."""
    if binary:
        estimate = shares_over_seeds(values, resamples, seed)
    else:
        estimate = over_seeds(values, resamples, seed, bounds)
    means = [None if torch.isnan(v).all() else float(torch.nanmean(v)) for v in values]
    return {**estimate.as_dict(), "each": means}


def by_number(found: dict[str, Any], numbers: Iterable[int], total: int) -> dict[str, Any]:
    """An estimate whose ``each`` has a place for every training; ``None`` for those that are missing.

    Args:
        found: the estimate, its ``each`` of those that are there.
        numbers: of these, from 0.
        total: how many trainings were asked for.
    """
    known = dict(zip(numbers, found["each"], strict=True))
    return {**found, "each": [known.get(i) for i in range(total)]}


class OverSeeds:
    """Sums up the cells of all repeats of a run, in the cells of the first.

    Args:
        experiment: what was run.
        folder: the directory of the first.
        summaries: of the experiment.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, summaries: Summaries) -> None:
        self.experiment, self.summaries = experiment, summaries
        self.folder, self.folders = folder, repeats(experiment, folder)
        self.resamples = experiment.evaluation.bootstrap

    def write(self) -> None:
        """Bring every cell up to date with what the repeats hold; a cell of one seed says nothing of seeds."""
        for row in self.experiment.rows:
            for column in self.experiment.columns:
                cell = self.folder.done(row.label, column.label)
                if cell is None:
                    continue
                before = cell.pop("seeds", None)
                found = self._of(row, column, cell, before) if len(self.folders) > 1 else None
                if found != before:
                    new = cell if found is None else {**cell, "seeds": found}
                    self.folder.write_cell(row.label, column.label, new, None)

    def _of(
        self, row: Row, column: Column, cell: dict[str, Any], before: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """The cell over all seeds; what was summed up ``before`` where nothing changed since."""
        known = {i: c for i, f in enumerate(self.folders) if (c := f.done(row.label, column.label)) is not None}
        cells, folders = list(known.values()), [self.folders[i] for i in known]
        if len(cells) < 2:
            return None
        reference = self.experiment.reference(row).label
        plain = [f.done(reference, column.label) for f in folders]
        made_of: list[Any] = [[list(known), self.summaries.origins.summary, sorted(cell["measures"])]]
        made_of += [[c and c["arrays_sha256"] for c in some] for some in (cells, plain)]
        digest = files.digest(made_of)
        if before is not None and before["made_of"] == digest:
            return before
        several = [f.arrays(row.label, column.label) for f in folders]
        seed, total = derive(self.experiment.seed, "statistics"), len(self.folders)
        measures = {}
        for name in cell["measures"]:
            if name in AREAS:
                having = {i: c["measures"][name] for i, c in known.items() if name in c["measures"]}
                measures[name] = by_number(_areas(list(having.values())), having, total)
            else:
                binary = self.summaries.binary(name)
                bounds = self.summaries.bounds(name)
                found = over_all(stacked(several, name), binary, self.resamples, seed, bounds)
                measures[name] = by_number(found, known, total)
        return {
            "count": len(cells),
            "missing": [i for i in range(len(self.folders)) if i not in known],
            "made_of": digest,
            "measures": measures,
            "against_undefended": self._against(row, column, cell, folders, several),
        }

    def _against(
        self,
        row: Row,
        column: Column,
        cell: dict[str, Any],
        folders: Sequence[RunFolder],
        several: Sequence[dict[str, Tensor]],
    ) -> dict[str, Any]:
        """Paired differences to the undefended row of the same repeat."""
        reference = self.experiment.reference(row)
        if any(f.done(reference.label, column.label) is None for f in folders):
            return {}
        plain = [f.arrays(reference.label, column.label) for f in folders]
        found, seed = {}, derive(self.experiment.seed, "paired")
        for name in cell["against_undefended"]:
            pairs = zip(several, plain, strict=True)
            both = [(a, b) for a, b in pairs if name in a and name in b]
            differences = [{"sample": a["sample"], name: a[name] - b[name]} for a, b in both]
            bounds, binary = self.summaries.bounds(name), self.summaries.binary(name)
            estimate = over_seeds_difference(stacked(differences, name), self.resamples, seed, bounds, binary)
            found[name] = estimate.as_dict()
        return found


def _areas(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    known = [Estimate(e["value"], e["low"], e["high"], e["count"]) for e in found]
    return {**of_estimates(known).as_dict(), "each": [e.value for e in known]}
