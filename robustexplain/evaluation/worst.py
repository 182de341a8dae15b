"""The worst case of each row, sample by sample: whether any attacker of the matrix won it. It ranks the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..random_streams import derive
from ..recipe.experiment import Column, Row
from .differences import Difference, difference, holm
from .doubts import Doubts
from .results import Results
from .statistics import Estimate, estimate
from .store import RunFolder

Arrays = Mapping[tuple[str, str], Mapping[str, Tensor]]
"""The arrays of the cells that are done, by row and column."""
CHANCE = 0.05
"""The corrected p-value below which a difference is called one."""


@dataclass(frozen=True, eq=False)
class WorstCase:
    """What a row is worth.

    Args:
        row: its label.
        share: of the samples that at least one attacker won.
        values: ``[N]``, 1 where one did, NaN where the sample does not count.
        samples: ``[N]``, which they are.
        wins: the share that each attacker won, by column.
        left_out: columns that failed or are missing: what they would have won is not in it.
        doubted: why it may be worse than this; empty where it is to be believed.
        difference: to the row that its defenses stand on, paired on the same samples; ``None`` for such a row itself.
        p: of that difference, corrected for all that the report makes.
        each: the share of each seed, where everything was trained several times.
        aims: ``forge`` and ``move``: the share by the attackers of one aim alone, another prediction or another map,
            where the matrix has both.
    """

    row: str
    share: Estimate
    values: Tensor
    samples: Tensor
    wins: dict[str, float]
    left_out: tuple[str, ...]
    doubted: tuple[str, ...]
    difference: Difference | None = None
    p: float | None = None
    each: tuple[float, ...] = ()
    aims: dict[str, Estimate] = field(default_factory=dict)

    @property
    def strongest(self) -> str:
        """The attacker that won most."""
        return max(self.wins, key=lambda column: self.wins[column])

    @property
    def better(self) -> bool:
        """Whether fewer samples fell than in the undefended row, beyond chance."""
        found = self.difference
        return self.p is not None and self.p < CHANCE and found is not None and (found.value or 0.0) < 0


@dataclass(frozen=True)
class Ranking:
    """The rows by their worst case.

    Args:
        cases: by row, the row that lost least first.
        against: corrected p-values of the best defended row against each other row, on the same samples.
        best: the defended row that lost least and is to be believed; ``None`` if there is none.
        tests: how many comparisons the correction is for.
    """

    cases: dict[str, WorstCase]
    against: dict[str, float]
    best: str | None
    tests: int


def seeds_of(results: Results) -> int:
    """How often everything was trained."""
    found = [cell["seeds"]["count"] for cell in results.cells.values() if cell and "seeds" in cell]
    return max(found, default=1)


def headline(results: Results) -> str:
    """The measure of the matrix: that an attacker won, among inputs that are right where only those are judged.

    Without any attacker it is what the classifier gets right: joint success would be its errors.
    """
    if not attackers(results) and results.has("correct"):
        return "correct"
    return "joint_correct" if results.experiment.evaluation.only_correct and results.has("joint_correct") else "joint"


def arrays_of(results: Results, folder: RunFolder) -> Arrays:
    """The arrays of every cell that is done."""
    done = [where for where, cell in results.cells.items() if cell and cell["status"] == "done"]
    return {where: folder.arrays(*where) for where in done}


def attackers(results: Results) -> list[Column]:
    """The columns that count: all that change an input. Noise is an attacker too, if a blind one."""
    return [column for column in results.experiment.columns if not column.facts.clean]


def ranking(results: Results, arrays: Arrays, doubts: Doubts) -> Ranking:
    """The worst case of every row that its owner did not manipulate, compared and corrected (Holm 1979)."""
    rows = [row for row in results.experiment.rows if not results.experiment.manipulated(row)]
    found = {row.label: case for row in rows if (case := worst_case(results, arrays, doubts, row)) is not None}
    settings = results.experiment.evaluation
    seed = derive(results.experiment.seed, "worst")

    def compared(mine: WorstCase, other: WorstCase) -> Difference | None:
        same = torch.equal(mine.samples, other.samples)
        return difference(mine.values, other.values, True, settings.bootstrap, seed) if same else None

    several, differences = seeds_of(results) > 1, {}
    for row in rows:
        root = results.experiment.reference(row).label
        if row.label in found and row.derived and root in found:
            mine, other = found[row.label], found[root]
            differences[row.label] = _over_seeds(results, row) if several else compared(mine, other)
    defended = [row.label for row in rows if row.derived and row.label in found]
    believed = [label for label in defended if not found[label].doubted]
    best = min(believed, key=lambda label: (_value(found[label]), -_gain(differences.get(label))), default=None)
    others = {} if best is None else {o: compared(found[best], found[o]) for o in found if o != best}
    # Of several seeds only what covers all of them is called a difference.
    others = {o: d for o, d in others.items() if best is not None and o != _root(results, best) and not several}
    family = [*differences.values(), *others.values()]
    tested = [d.p for d in family if d is not None and d.p is not None]
    corrected = iter(holm(tested))
    p = [None if d is None or d.p is None else next(corrected) for d in family]
    own, against = p[: len(differences)], p[len(differences) :]
    for (label, d), value in zip(differences.items(), own, strict=True):
        found[label] = replace(found[label], difference=d, p=value)
    order = sorted(found, key=lambda label: _value(found[label]))
    known = {o: v for o, v in zip(others, against, strict=True) if v is not None}
    return Ranking({label: found[label] for label in order}, known, best, len(tested))


def worst_case(
    results: Results, arrays: Arrays, doubts: Doubts, row: Row, columns: Sequence[Column] | None = None
) -> WorstCase | None:
    """The worst case of one row over some columns (default all attackers); ``None`` where no cell of them is done."""
    columns = attackers(results) if columns is None else columns
    done = [c for c in columns if (row.label, c.label) in arrays]
    if not done:
        return None
    name = headline(results)
    won = {c.label: arrays[row.label, c.label].get(name, arrays[row.label, c.label]["joint"]).double() for c in done}
    samples = arrays[row.label, done[0].label]["sample"]
    values = any_won(list(won.values()))
    settings = results.experiment.evaluation
    share = estimate(values, True, settings.bootstrap, derive(results.experiment.seed, "worst"))
    wins = {label: float(value.nanmean()) for label, value in won.items()}
    left_out = tuple(c.label for c in columns if c not in done)
    why = [f"{', '.join(left_out)} failed or {'is' if len(left_out) == 1 else 'are'} missing"] if left_out else []
    case = WorstCase(row.label, share, values, samples, wins, left_out, (*why, *_doubted(doubts, row, done)))
    case = replace(case, aims=_aims(done, won))
    known = _known(results, row).get("measures", {})
    if len(known.get("worst", {}).get("each", ())) < 2 or len(columns) < len(attackers(results)):
        return case
    each = tuple(value for value in known["worst"]["each"] if value is not None)
    aims = {aim: _estimate(known[f"worst_{aim}"]) for aim in case.aims if f"worst_{aim}" in known}
    return replace(case, share=_estimate(known["worst"]), each=each, aims=aims)


def _estimate(known: dict[str, Any]) -> Estimate:
    return Estimate(known["value"], known["low"], known["high"], known["count"])


def _aims(columns: Sequence[Column], won: Mapping[str, Tensor]) -> dict[str, Estimate]:
    labels = {
        "forge": [c.label for c in columns if not c.facts.keeps_prediction],
        "move": [c.label for c in columns if c.facts.keeps_prediction],
    }
    if not all(labels.values()):
        return {}
    return {aim: estimate(any_won([won[label] for label in own]), True) for aim, own in labels.items()}


def _known(results: Results, row: Row) -> dict[str, Any]:
    """What the run itself says of a row's worst case, over all its seeds."""
    found: dict[str, dict[str, Any]] = getattr(results, "worst", {})
    return found.get(row.label, {})


def _over_seeds(results: Results, row: Row) -> Difference | None:
    known = _known(results, row).get("against_undefended", {}).get("worst")
    return None if known is None else Difference(*(known[key] for key in ("value", "low", "high", "count", "p")))


def any_won(won: Sequence[Tensor]) -> Tensor:
    """``[N]``: 1 where any of several attackers won, 0 where none did, NaN where no attacker's win is defined."""
    every = torch.stack([value.double() for value in won])
    known = ~every.isnan()
    return torch.where(known.any(0), ((every > 0) & known).any(0).double(), torch.nan)


def _doubted(doubts: Doubts, row: Row, columns: Sequence[Column]) -> tuple[str, ...]:
    """Why nothing is known of the strongest attackers: all cells of those who know most are in doubt."""
    real = [c for c in columns if not c.facts.control]
    adaptive = [c for c in real if c.knowledge == "adaptive" and c.facts.needs_maps]
    decisive = adaptive or [c for c in real if c.facts.needs_maps] or real
    reasons = [doubts.get((row.label, c.label), []) for c in decisive]
    if not decisive:
        return ("no attack was tried, only controls",)
    return tuple(dict.fromkeys(why for some in reasons for why in some)) if all(reasons) else ()


def _root(results: Results, label: str) -> str:
    return results.experiment.reference(results.experiment.row(label)).label


def _value(case: WorstCase) -> float:
    return float("inf") if case.share.value is None else case.share.value


def _gain(found: Difference | None) -> float:
    return 0.0 if found is None or found.value is None else -found.value
