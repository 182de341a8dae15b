"""The contents of a run directory: the experiment, its cells and the costs of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..recipe import check
from ..recipe.experiment import AttackFacts, Column, Evaluation, Experiment, Recipe, Row
from ..schema import make
from .mending import damaged, damaged_cell
from .store import RunFolder
from .words import Words, words_of
from .worst import MAIN, Worst, attackers, read_worst


@dataclass(frozen=True)
class Results:
    """Everything that the report shows, read from the run directory.

    Args:
        experiment: what was run.
        run: identity and library versions.
        cells: by row label and column label; a missing cell is ``None``.
        rows: cost of each row, by label.
        calibrations: what is known of each row under harmless changes, by label: the limit of a plausible distance,
            the share of changed predictions, false alarms.
        words: what each measure is called.
        damaged: files that were left out, and why: damaged, or changed since they were written.
        worst: each row's worst case by label.
        audits: what is known of each manipulated row, by label.
    """

    experiment: Experiment
    run: dict[str, Any]
    cells: dict[tuple[str, str], dict[str, Any] | None]
    rows: dict[str, dict[str, Any]]
    words: dict[str, Words]
    calibrations: dict[str, dict[str, Any]] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    worst: dict[str, Worst] = field(default_factory=dict)
    audits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: RunFolder) -> Results:
        """Read the results of a run, finished or not; a cell that is damaged or was changed counts as missing.

        Raises:
            DamagedFileError: ``run.json`` or the recipe is damaged, or was changed since the run.
        """
        run, source = folder.run, folder.source()
        if run["kind"] == "recipe":
            experiment: Experiment = check(source)
            words = words_of(experiment.metrics)
        else:
            experiment, words = read_back(source, folder.root.name)
        rows, columns = experiment.rows, experiment.columns
        why = {(r.label, c.label): damaged_cell(folder, r.label, c.label) for r in rows for c in columns}
        cells = {where: None if why[where] else folder.read_cell(*where) for where in why}
        costs = {r.label: folder.row(r.label) for r in rows if folder.row(r.label).is_file()}
        limits = {r.label: folder.calibration(r.label) for r in rows if folder.calibration(r.label).is_file()}
        bad = {path: damaged(folder, path) for path in (*costs.values(), *limits.values())}
        read = {label: folder.read_part(path) for label, path in costs.items() if not bad[path]}
        known = {label: folder.read_part(path) for label, path in limits.items() if not bad[path]}
        left_out = tuple(w for w in (*why.values(), *bad.values()) if w)
        lies = {r.label: folder.audit(r.label) for r in rows if folder.audit(r.label).is_file()}
        audits = {label: folder.read_part(path) for label, path in lies.items() if damaged(folder, path) is None}
        return cls(experiment, run, cells, read, words, known, left_out, read_worst(experiment, folder), audits)

    def __repr__(self) -> str:
        size = f"{len(self.experiment.rows)} rows x {len(self.experiment.columns)} columns"
        return f"Results({self.experiment.name!r}: {size}, {len(self._done)} cells done)"

    @property
    def recipe(self) -> Recipe:
        """The recipe that was run.

        Raises:
            InputError: systems and attacks came from Python, not from a recipe.
        """
        if not isinstance(self.experiment, Recipe):
            raise InputError(f"{self.experiment.name} was evaluated from Python, without a recipe")
        return self.experiment

    @property
    def things(self) -> str:
        """The evaluated inputs, as a word: images, or a table's rows."""
        return "rows" if self.run.get("features") else "images"

    @property
    def judged(self) -> int:
        """The number of evaluated inputs."""
        found = [cell["measures"]["success"]["count"] for cell in self.cells.values() if cell and "measures" in cell]
        return max(found, default=0)

    @property
    def main(self) -> str:
        """The measure of the matrix: that an attacker won, among inputs that the row and its root get right.

        Without any attacker it is what the classifier gets right: joint success would be its errors.
        """
        if not attackers(self.experiment) and self.has("correct"):
            return "correct"
        return MAIN if self.has(MAIN) else "joint"

    @property
    def seeds(self) -> int:
        """How often everything was trained; 1: intervals cover the inputs alone."""
        return max((cell["seeds"]["count"] for cell in self._done if "seeds" in cell), default=1)

    def measure(self, row: str, column: str, name: str) -> dict[str, Any] | None:
        """One estimate, over all seeds if there are several, or ``None`` where the cell or the measure is missing."""
        cell = self.cells.get((row, column))
        if not cell or cell["status"] != "done":
            return None
        found = cell.get("seeds", cell)["measures"].get(name)
        return found if found and found["value"] is not None else None

    def of_attackers(self, row: str, column: Column) -> dict[str, Any] | None:
        """The main measure of a cell; ``None`` where it is an attacker's success and nobody attacks."""
        nobody = column.facts.clean and self.main != "correct"
        return None if nobody else self.measure(row, column.label, self.main)

    def against(self, row: str, column: str, name: str) -> dict[str, Any] | None:
        """A paired difference to the undefended row, with its p-value, over all seeds if there are several."""
        cell = self.cells.get((row, column))
        found = cell.get("seeds", cell)["against_undefended"].get(name) if cell and cell["status"] == "done" else None
        return found if found and found["value"] is not None else None

    def raised(self, row: str, column: str) -> int | None:
        """The steps to which a cell's attack was raised (``audit: {raise: true}``); ``None`` where it has its own."""
        cell = self.cells.get((row, column))
        return int(cell["raised"]["to"]) if cell and "raised" in cell else None

    def flags(self, row: str, column: str) -> list[dict[str, str]]:
        """Why a cell is not to be believed, each a ``name`` and a ``reason``."""
        cell = self.cells.get((row, column))
        return list(cell.get("flags", [])) if cell else []

    def has(self, name: str) -> bool:
        """Whether any cell reports this measure."""
        return any(cell and name in cell.get("measures", {}) for cell in self.cells.values())

    def differs(self, name: str, other: str) -> bool:
        """Whether two measures differ anywhere."""
        return any(cell["measures"].get(name) != cell["measures"].get(other) for cell in self._done)

    @property
    def _done(self) -> list[dict[str, Any]]:
        return [cell for cell in self.cells.values() if cell and cell["status"] == "done"]


def read_back(known: dict[str, Any], name: str) -> tuple[Experiment, dict[str, Words]]:
    """An experiment whose systems and attacks came from Python, for a report, and its measures' words."""
    rows = tuple(Row(**{**row, "settings": None}) for row in known["rows"])
    columns = tuple(Column(**{**column, "attack": AttackFacts(**column["attack"])}) for column in known["columns"])
    experiment = Experiment(
        name=name,
        about=known["about"],
        seed=known["seed"],
        rows=rows,
        columns=columns,
        metrics=dict.fromkeys(known["metrics"]),
        evaluation=make(Evaluation, known["evaluation"], "evaluation"),
        source=known,
    )
    return experiment, {name: Words(*words) for name, words in known["words"].items()}
