"""Rows of several runs on one page, ranked by their worst case among those that were measured in the same way."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, pages
from ..errors import InputError
from ..recipe.experiment import Recipe
from .comparing import Side
from .ranking import WorstCase, ranking
from .results import Results
from .store import REPORT, RunFolder


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of a run.

    Args:
        case: its worst case.
        results: its run.
        folder: where the run is.
        label: of the row.
        flags: how many of its cells are in doubt, and of how many.
        reasons: why.
        protocol: a hash of the way it was measured: data, judging, attackers.
    """

    case: WorstCase
    results: Results
    folder: RunFolder
    label: str
    flags: tuple[int, int]
    reasons: tuple[str, ...]
    protocol: str

    @property
    def undefended(self) -> bool:
        """Whether no defense stands in it."""
        return not self.results.experiment.row(self.label).derived

    @property
    def model(self) -> str:
        """The classifier's name, where it came from a recipe."""
        found = self.results.experiment
        return found.model.name if isinstance(found, Recipe) else "from Python"

    @property
    def cost(self) -> dict[str, Any]:
        """Accuracy and time."""
        return self.results.rows.get(self.label, {})

    @property
    def seeds(self) -> str:
        """Which seeds it was run with."""
        count, seed = self.results.seeds, self.results.run["seed"]
        return f"{count}, seed {seed}" if count == 1 else f"{count}, from seed {seed}"

    def report(self, page: Path) -> str | None:
        """The way from the page to the run's report; ``None`` where there is none."""
        file = self.folder.root / REPORT
        return Path(os.path.relpath(file, page.parent)).as_posix() if file.is_file() else None


@dataclass(frozen=True, eq=False)
class Board:
    """Entries that were measured in the same way, the one that lost least first; those in doubt stand last.

    Args:
        entries: ranked.
    """

    entries: tuple[Entry, ...]

    @property
    def attackers(self) -> list[str]:
        """Who attacked, with radius and steps."""
        columns = [c for c in self.entries[0].results.experiment.columns if not c.facts.clean]
        found = []
        for column in columns:
            raised = [n for e in self.entries if (n := e.results.raised(e.label, column.label)) is not None]
            more = [f"raised to {max(raised)} steps where that wins more"] if raised else []
            words = ", ".join([part for part in (column.facts.settings,) if part] + more)
            found.append(f"{column.label} ({words})" if words else column.label)
        return found

    @property
    def data(self) -> str:
        """The data's name, else their digest."""
        run = self.entries[0].results.run
        return str(run.get("data_name") or run["data"][:12])


def boards(folders: Sequence[RunFolder]) -> list[Board]:
    """The rows of several runs, in a board for each way of measuring; the largest first.

    Raises:
        InputError: no row of an honest owner with a finished cell.
    """
    groups: dict[str, list[Entry]] = defaultdict(list)
    for folder in folders:
        for entry in entries(folder):
            groups[entry.protocol].append(entry)
    if not groups:
        raise InputError("no run has a finished cell of a row that its owner did not manipulate: nothing to rank")
    ranked = [Board(tuple(sorted(group, key=_place))) for group in groups.values()]
    return sorted(ranked, key=lambda board: -len(board.entries))


def entries(folder: RunFolder) -> list[Entry]:
    """The rows of one run."""
    side = Side.read(folder)
    results, way = side.results, protocol(side.results)
    made = []
    for label, case in ranking(results, side.seeds[0], side.doubts).cases.items():
        own = {where: why for where, why in side.doubts.items() if where[0] == label}
        reasons = tuple(dict.fromkeys([*case.doubted, *(r for why in own.values() for r in why)]))
        total = sum(where[0] == label for where in side.seeds[0])
        made.append(Entry(case, results, folder, label, (len(own), total), reasons, way))
    return made


def protocol(results: Results) -> str:
    """A hash of the way a run measures: data, how inputs are judged, version and attackers; not its rows or model.

    A run in which attacks were given more steps than they ask for is measured in another way.
    """
    judging = {
        k: v for k, v in results.experiment.evaluation.entry.items() if k not in ("bootstrap", "pictures", "batch_size")
    }
    columns = []
    for c in results.experiment.columns:
        facts = c.facts
        if not facts.clean:
            columns.append([facts.name, facts.family, facts.eps, facts.steps, c.knowledge, c.goal_map, c.source])
    raised = any("raised" in cell for cell in results.cells.values() if cell)
    way = [results.run["version"], results.run["data"], judging, sorted(columns, key=str)]
    return files.digest([*way, "raised"] if raised else way)


def _place(entry: Entry) -> tuple[float, ...]:
    """Believed rows first; by what each aim's attackers won where there are both, forgers first."""
    shares = list(entry.case.aims.values()) or [entry.case.share]
    return (bool(entry.case.doubted), *(2.0 if share.value is None else share.value for share in shares))


def write_leaderboard(folders: Sequence[RunFolder], out: Path) -> Path:
    """Write the page; see :func:`boards`."""
    from .drawings import bar

    found = boards(folders)
    page = pages.render(
        "robustexplain.evaluation",
        "leaderboard.html.j2",
        boards=found,
        out=out,
        bar=bar,
        runs=len({entry.folder.root for b in found for entry in b.entries}),
    )
    return files.write_text(out, page)
