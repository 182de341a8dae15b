"""The worst case of each row: per sample, whether any attacker won. The run writes it, the report reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import files, seals
from ..errors import DamagedFileError
from ..random_streams import derive
from ..recipe.experiment import Column, Experiment, Row
from .differences import Difference, difference, over_seeds_difference
from .mending import damaged_cell
from .seeds import by_number, over_all, repeats, stacked
from .statistics import UNIT, Estimate, share
from .store import RunFolder

WORST = "worst case"
"""In tables, the column of a row's worst case."""
AIMS = {"forge": False, "move": True}
"""What attackers want, and whether they keep the prediction: another prediction, or another map."""
DRAWS = 10_000
"""Of a bootstrap whose p-value is corrected: of 2,000 none is below 0.001, and of fifty comparisons none below 0.05."""
MAIN = "joint_correct"
"""What says that an attacker won: among inputs that the row and its root get right, whose errors are no success."""
Cells = Mapping[str, Mapping[str, Tensor]]
"""The arrays of a row's finished cells, by column."""


@dataclass(frozen=True, eq=False)
class Worst:
    """The worst case of a row over some columns.

    Args:
        several: for each seed by its number, ``[N]`` each: ``sample``, and ``worst``, 1 where any attacker won and NaN
            where the sample does not count; ``worst_forge`` and ``worst_move`` by those of one aim alone, where the
            columns have both.
        measures: the share of each by its name, as plain data, over all seeds if there are several.
        against: paired difference of each to the row that its defenses stand on, as plain data.
        missing: columns that are in none of it, or not under every seed.
    """

    several: dict[int, dict[str, Tensor]]
    measures: dict[str, dict[str, Any]]
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many seeds it is over."""
        return len(self.several)

    def estimate(self, name: str = "worst") -> Estimate:
        """One share."""
        return Estimate(*(self.measures[name][key] for key in ("value", "low", "high", "count")))

    def by(self, aim: str) -> Worst | None:
        """The worst case by the attackers of one aim; ``None`` where the columns do not have both."""
        name = f"worst_{aim}"
        if name not in self.measures:
            return None
        several = {
            i: {"sample": found["sample"], "worst": found[name]} for i, found in self.several.items() if name in found
        }
        against = {"worst": self.against[name]} if name in self.against else {}
        return Worst(several, {"worst": self.measures[name]}, against, self.missing)

    @property
    def each(self) -> tuple[float, ...]:
        """The share of each seed; empty where everything was trained once."""
        return tuple(value for value in self.measures["worst"].get("each", ()) if value is not None)


def attackers(experiment: Experiment) -> list[Column]:
    """The columns that count: all that change an input. Random noise is an attacker too, if a blind one."""
    return [column for column in experiment.columns if not column.facts.clean]


def any_won(won: Sequence[Tensor]) -> Tensor:
    """``[N]``: 1 where any of several attackers won, 0 where none did, NaN where no attacker's win is defined."""
    every = torch.stack([value.double() for value in won])
    known = ~every.isnan()
    return torch.where(known.any(0), ((every > 0) & known).any(0).double(), torch.nan)


def over_columns(experiment: Experiment, columns: Sequence[Column], seeds: Mapping[int, Cells]) -> Worst | None:
    """A row's worst case over some columns; ``None`` where no cell of them is done under any seed.

    Args:
        experiment: what was run.
        columns: the attackers.
        seeds: the row's cells of each seed, by its number.
    """
    several = {i: found for i, cells in seeds.items() if (found := _wins(columns, cells))}
    if not several:
        return None
    missing = tuple(c.label for c in columns if any(c.label not in seeds[i] for i in several))
    arrays = list(several.values())
    names = dict.fromkeys(name for one in arrays for name in one if name != "sample")
    if len(several) == 1:
        measures = {name: share(arrays[0][name]).as_dict() for name in names}
    else:
        resamples, seed = experiment.evaluation.bootstrap, derive(experiment.seed, "worst")
        measures = {
            name: by_number(over_all(stacked(arrays, name), True, resamples, seed), several, max(seeds) + 1)
            for name in names
        }
    return Worst(several, measures, {}, missing)


def compared(experiment: Experiment, mine: Worst, other: Worst) -> dict[str, Difference]:
    """Paired differences of two worst cases by name, over the seeds that both have; empty if no sample is the same."""
    pairs = [(mine.several[i], other.several[i]) for i in mine.several if i in other.several]
    if not pairs or not all(torch.equal(a["sample"], b["sample"]) for a, b in pairs):
        return {}
    names = [n for n in pairs[0][0] if n != "sample" and all(n in side for pair in pairs for side in pair)]
    resamples, seed = max(experiment.evaluation.bootstrap, DRAWS), derive(experiment.seed, "worst")
    if len(pairs) == 1:
        ((a, b),) = pairs
        return {name: difference(a[name], b[name], True, resamples, seed) for name in names}
    found = {}
    for name in names:
        gaps = [{"sample": a["sample"], name: a[name] - b[name]} for a, b in pairs]
        found[name] = over_seeds_difference(stacked(gaps, name), resamples, seed, UNIT, binary=True)
    return found


def write_worst(experiment: Experiment, folder: RunFolder) -> None:
    """Write every row's worst case; a row without a finished cell of an attacker has none."""
    found = _compared_with_roots(experiment, dict(_computed(experiment, folder, experiment.rows)), experiment.rows)
    for row in experiment.rows:
        path, beside = folder.worst(row.label), folder.worst(row.label).with_suffix(".safetensors")
        if row.label not in found:
            path.unlink(missing_ok=True)
            beside.unlink(missing_ok=True)
            continue
        mine = found[row.label]
        arrays = {f"{i}/{name}": t.contiguous() for i, some in mine.several.items() for name, t in some.items()}
        files.write_tensors(beside, arrays)
        summary = {
            "row": row.label,
            "made_of": _made_of(experiment, folder, row),
            "missing": list(mine.missing),
            "measures": mine.measures,
            "against_undefended": mine.against,
        }
        seals.write(path, summary, beside)


def read_worst(experiment: Experiment, folder: RunFolder) -> dict[str, Worst]:
    """Every row's worst case by its label; computed where none is written, or one that is damaged or of other cells."""
    read = {row.label: _read(experiment, folder, row) for row in experiment.rows}
    lacking = [row for row in experiment.rows if read[row.label] is None]
    known = {label: worst for label, worst in read.items() if worst is not None}
    known |= dict(_computed(experiment, folder, lacking))
    return _compared_with_roots(experiment, known, lacking)


def _compared_with_roots(experiment: Experiment, known: Mapping[str, Worst], rows: Sequence[Row]) -> dict[str, Worst]:
    """What is known, some rows with their differences to the rows that their defenses stand on."""
    found = dict(known)
    for row in rows:
        if row.root != row.label and row.label in known and row.root in known:
            differences = compared(experiment, known[row.label], known[row.root])
            against = {name: difference.as_dict() for name, difference in differences.items()}
            found[row.label] = replace(known[row.label], against=against)
    return found


def _computed(experiment: Experiment, folder: RunFolder, rows: Sequence[Row]) -> Iterator[tuple[str, Worst]]:
    columns = attackers(experiment)
    for row in rows:
        cells = {i: cells_of(f, row, columns) for i, f in enumerate(repeats(experiment, folder))}
        worst = over_columns(experiment, columns, {i: some for i, some in cells.items() if some})
        if worst is not None:
            yield row.label, worst


def _read(experiment: Experiment, folder: RunFolder, row: Row) -> Worst | None:
    """What is written, if it is of the cells that are there."""
    path = folder.worst(row.label)
    known = seals.read_or_none(path, "made_of", "measures", "against_undefended", "missing") if path.is_file() else None
    if known is None or known["made_of"] != _made_of(experiment, folder, row):
        return None
    with suppress(DamagedFileError):
        beside = path.with_suffix(".safetensors")
        seals.check_arrays(known, beside)
        several: dict[int, dict[str, Tensor]] = {}
        for name, values in files.read_tensors(beside)[0].items():
            number, _, own = name.partition("/")
            several.setdefault(int(number), {})[own] = values
        several = {i: several[i] for i in sorted(several)}
        return Worst(several, known["measures"], known["against_undefended"], tuple(known["missing"]))
    return None


def _made_of(experiment: Experiment, folder: RunFolder, row: Row) -> dict[str, str]:
    """The content hashes of the arrays of the row's cells, and of those of the row that it is held against."""
    found = {}
    for i, part in enumerate(repeats(experiment, folder)):
        for label in dict.fromkeys((row.label, row.root)):
            for column in attackers(experiment):
                if damaged_cell(part, label, column.label) is None and (cell := part.done(label, column.label)):
                    found[f"{i}/{label}/{column.label}"] = str(cell[seals.ARRAYS])
    return found


def cells_of(folder: RunFolder, row: Row, columns: Sequence[Column]) -> dict[str, dict[str, Tensor]]:
    """The arrays of a row's finished cells that are not damaged."""
    found = {}
    for column in columns:
        with suppress(DamagedFileError):
            if folder.done(row.label, column.label) is not None:
                found[column.label] = folder.arrays(row.label, column.label)
    return found


def _wins(columns: Sequence[Column], cells: Cells) -> dict[str, Tensor]:
    done = [column for column in columns if column.label in cells]
    if not done:
        return {}
    won = {c.label: cells[c.label].get(MAIN, cells[c.label]["joint"]) for c in done}
    found = {"sample": cells[done[0].label]["sample"], "worst": any_won(list(won.values()))}
    sides = {aim: [won[c.label] for c in done if c.facts.keeps_prediction is keeps] for aim, keeps in AIMS.items()}
    if all(sides.values()):
        found |= {f"worst_{aim}": any_won(side) for aim, side in sides.items()}
    return found
