"""The rows of a run by their worst case, compared with the rows that they stand on and with one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..recipe.experiment import Column, Row
from .differences import Difference, holm
from .doubts import Doubts
from .probing import decisive
from .results import Results
from .statistics import Estimate
from .store import RunFolder
from .worst import AIMS, WORST, Worst, attackers, compared, over_columns

Arrays = Mapping[tuple[str, str], Mapping[str, Tensor]]
"""The arrays of the cells that are done, by row and column."""
CHANCE = 0.05
"""The corrected p-value below which a difference is called one."""


@dataclass(frozen=True, eq=False)
class WorstCase:
    """What a row is worth.

    Args:
        row: its label.
        worst: its worst case, of each seed.
        wins: the share that each attacker won, by column.
        doubted: why it may be worse than this; empty where it is to be believed.
        difference: to the row that its defenses stand on, paired on the same samples; ``None`` for such a row itself.
        p: of that difference, corrected for all that the report makes.
    """

    row: str
    worst: Worst
    wins: dict[str, float]
    doubted: tuple[str, ...]
    difference: Difference | None = None
    p: float | None = None

    @property
    def share(self) -> Estimate:
        """Of the samples that at least one attacker won."""
        return self.worst.estimate()

    @property
    def each(self) -> tuple[float, ...]:
        """The share of each seed, where everything was trained several times."""
        return self.worst.each

    @property
    def aims(self) -> dict[str, Estimate]:
        """``forge`` and ``move``: the share by the attackers of one aim alone, where the matrix has both."""
        return {aim: self.worst.estimate(f"worst_{aim}") for aim in AIMS if f"worst_{aim}" in self.worst.measures}

    @property
    def strongest(self) -> str:
        """The attacker that won most; empty where none won."""
        won = {column: share for column, share in self.wins.items() if share > 0}
        return max(won, key=lambda column: won[column], default="")

    @property
    def differs(self) -> bool:
        """Whether the corrected test tells it from the undefended row."""
        return self.p is not None and self.p < CHANCE and self.difference is not None

    @property
    def better(self) -> bool:
        """Whether fewer samples fell than in the undefended row, beyond chance."""
        return self.differs and _gain(self.difference) > 0

    @property
    def worse(self) -> bool:
        """Whether more samples fell than in the undefended row, beyond chance."""
        return self.differs and _gain(self.difference) < 0


@dataclass(frozen=True)
class Ranking:
    """The rows by their worst case.

    Args:
        cases: by row, the row that lost least first; where there are attackers of both aims, the one that lost least to
            those who want another prediction, and then to those who want another map.
        against: the best defended row less each other row on the same samples, and the corrected p-value.
        best: the defended row that lost least and is to be believed; ``None`` if there is none.
        tests: how many comparisons the correction is for: each defended row's with its root, and each pair's of one
            that might have been the best; of both aims.
        aims: by aim, the rows by its attackers alone, where there are attackers of both: these are then compared. Who
            only wants another map wins more easily, and the common worst case would tell no row from another.
    """

    cases: dict[str, WorstCase]
    against: dict[str, tuple[Difference, float]] = field(default_factory=dict)
    best: str | None = None
    tests: int = 0
    aims: dict[str, Ranking] = field(default_factory=dict)

    @property
    def leading(self) -> dict[str, dict[str, WorstCase]]:
        """The cases that stand first in tables, under their heads: of each aim where there are both."""
        return {f"{WORST}, {aim}": side.cases for aim, side in self.aims.items()} or {WORST: self.cases}


def arrays_of(results: Results, folder: RunFolder) -> Arrays:
    """The arrays of every cell that is done."""
    done = [where for where, cell in results.cells.items() if cell and cell["status"] == "done"]
    return {where: folder.arrays(*where) for where in done}


def ranking(results: Results, arrays: Arrays, doubts: Doubts) -> Ranking:
    """The worst case of every row that its owner did not manipulate, compared and corrected (Holm 1979)."""
    rows = [row for row in results.experiment.rows if not results.experiment.manipulated(row)]
    whole = {row.label: case for row in rows if (case := worst_case(results, {0: arrays}, doubts, row)) is not None}
    sides = {aim: _by(results, whole, doubts, aim) for aim in AIMS}
    families = {aim: _Family.of(results, cases) for aim, cases in sides.items() if cases}
    if len(families) < len(AIMS):
        families = {"": _Family.of(results, whole)}
    # Which row is the best was seen first: with it go the pairs that another best would have been compared in.
    unseen = sum(family.unseen for family in families.values())
    values = [d.p for family in families.values() for d in family.differences if d is not None and d.p is not None]
    corrected = iter(holm(values, unseen))
    told = {aim: family.told(corrected, len(values) + unseen) for aim, family in families.items()}
    if "" in told:
        return told[""]
    order = sorted(whole, key=lambda label: [_value(side.cases.get(label)) for side in told.values()])
    return Ranking({label: whole[label] for label in order}, tests=len(values) + unseen, aims=told)


@dataclass(frozen=True, eq=False)
class _Family:
    """Comparisons that are corrected together, before they are.

    Args:
        cases: by row.
        gaps: of each defended row to its root.
        rivals: of the best defended row to each other one.
        best: the defended row that lost least and is to be believed.
        unseen: comparisons that another best row would have been in.
    """

    cases: dict[str, WorstCase]
    gaps: dict[str, Difference | None]
    rivals: dict[str, Difference | None]
    best: str | None
    unseen: int

    @classmethod
    def of(cls, results: Results, cases: dict[str, WorstCase]) -> _Family:
        experiment = results.experiment
        rows = [experiment.row(label) for label in cases]
        roots = {row.label: experiment.reference(row).label for row in rows if row.derived}
        gaps = {label: _gap(results, cases[label], cases.get(root)) for label, root in roots.items()}
        believed = [label for label in roots if not cases[label].doubted]
        best = min(believed, key=lambda label: (_value(cases[label]), -_gain(gaps[label])), default=None)
        others = [o for o in cases if best is not None and o not in (best, roots[best])]
        rivals = {o: _gap(results, cases[best], cases[o]) for o in others if best is not None}
        pairs = {frozenset((one, other)) for one in believed for other in cases if other not in (one, roots[one])}
        return cls(cases, gaps, rivals, best, len(pairs) - len(rivals))

    @property
    def differences(self) -> list[Difference | None]:
        return [*self.gaps.values(), *self.rivals.values()]

    def told(self, corrected: Iterator[float], tests: int) -> Ranking:
        """The ranking, with its share of the corrected p-values, which are in the order of ``differences``."""
        p = [None if d is None or d.p is None else next(corrected) for d in self.differences]
        cases = dict(self.cases)
        for (label, gap), value in zip(self.gaps.items(), p, strict=False):
            cases[label] = replace(cases[label], difference=gap, p=value)
        rivals = zip(self.rivals.items(), p[len(self.gaps) :], strict=True)
        against = {other: (gap, value) for (other, gap), value in rivals if gap is not None and value is not None}
        order = sorted(cases, key=lambda label: _value(cases[label]))
        return Ranking({label: cases[label] for label in order}, against, self.best, tests)


def _by(results: Results, whole: Mapping[str, WorstCase], doubts: Doubts, aim: str) -> dict[str, WorstCase]:
    """The same rows' worst cases by the attackers of one aim; empty where there are not both."""
    columns = [c for c in attackers(results.experiment) if c.facts.keeps_prediction is AIMS[aim]]
    found = {}
    for label, case in whole.items():
        worst = case.worst.by(aim)
        if worst is not None:
            mine = replace(worst, missing=tuple(c.label for c in columns if c.label in worst.missing))
            found[label] = _told(results, mine, doubts, results.experiment.row(label), columns)
    return found


def worst_case(
    results: Results, seeds: Mapping[int, Arrays], doubts: Doubts, row: Row, columns: Sequence[Column] | None = None
) -> WorstCase | None:
    """The worst case of one row; ``None`` where no cell of an attacker is done.

    Args:
        results: of the run.
        seeds: the arrays of each seed, by its number.
        doubts: of its cells.
        row: which one.
        columns: over these attackers; default all, for which the run itself may know it.
    """
    known = results.worst.get(row.label) if columns is None else None
    columns = attackers(results.experiment) if columns is None else columns
    cells = {
        i: {c.label: arrays[row.label, c.label] for c in columns if (row.label, c.label) in arrays}
        for i, arrays in seeds.items()
    }
    worst = known or over_columns(results.experiment, columns, cells)
    if worst is None:
        return None
    return _told(results, worst, doubts, row, columns)


def _told(results: Results, worst: Worst, doubts: Doubts, row: Row, columns: Sequence[Column]) -> WorstCase:
    """A worst case with what each attacker won, and with the reasons for which it is not to be believed."""
    cells = {c.label: results.cells.get((row.label, c.label)) for c in columns}
    done = [c for c in columns if (cell := cells[c.label]) is not None and cell["status"] == "done"]
    measured = {c.label: results.measure(row.label, c.label, results.main) for c in done}
    wins = {label: float(e["value"]) if e else 0.0 for label, e in measured.items()}
    lost = worst.missing
    why = [f"{', '.join(lost)} failed or {'is' if len(lost) == 1 else 'are'} missing"] if lost else []
    if worst.count < results.seeds and results.worst.get(row.label) is not None:
        why.append(f"{worst.count} of {results.seeds} trainings are done")
    return WorstCase(row.label, worst, wins, (*why, *_doubted(doubts, row, done)))


def _gap(results: Results, mine: WorstCase, other: WorstCase | None) -> Difference | None:
    """The difference of two rows; of several seeds only one that covers them all."""
    if other is None or mine.worst.several.keys() != other.worst.several.keys():
        return None
    return compared(results.experiment, mine.worst, other.worst).get("worst")


def _doubted(doubts: Doubts, row: Row, columns: Sequence[Column]) -> tuple[str, ...]:
    """Why nothing is known of the strongest attackers: all cells of those who know most are in doubt."""
    deciding = decisive(columns)
    reasons = [doubts.get((row.label, c.label), []) for c in deciding]
    if not deciding:
        return ("no attack was tried, only controls",)
    return tuple(dict.fromkeys(why for some in reasons for why in some)) if all(reasons) else ()


def _value(case: WorstCase | None) -> float:
    return float("inf") if case is None or case.share.value is None else case.share.value


def _gain(found: Difference | None) -> float:
    return 0.0 if found is None or found.value is None else -found.value
