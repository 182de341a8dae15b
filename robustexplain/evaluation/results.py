"""The contents of a run directory: the experiment, its cells and the costs of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..recipe import check
from ..recipe.experiment import AttackFacts, Column, Evaluation, Experiment, Recipe, Row
from .mending import damaged, damaged_cell
from .store import RunFolder
from .words import Words, words_of


@dataclass(frozen=True)
class Results:
    """Everything that the report shows, read from the run directory.

    Args:
        experiment: what was run.
        run: identity and library versions.
        cells: by row label and column label; a missing cell is ``None``.
        rows: cost of each row, by label.
        words: what each measure is called.
        damaged: files that were left out, and why: damaged, or changed since they were written.
    """

    experiment: Experiment
    run: dict[str, Any]
    cells: dict[tuple[str, str], dict[str, Any] | None]
    rows: dict[str, dict[str, Any]]
    words: dict[str, Words]
    damaged: tuple[str, ...] = ()

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
        bad = {label: damaged(folder, path) for label, path in costs.items()}
        read = {label: folder.read_part(path) for label, path in costs.items() if not bad[label]}
        return cls(experiment, run, cells, read, words, tuple(w for w in (*why.values(), *bad.values()) if w))

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
        """The measure that the report begins with.

        Where only inputs are judged that the undefended classifier gets right, those that a hardened one gets wrong by
        itself are no success of the attacker.
        """
        right = self.experiment.evaluation.only_correct and self.has("joint_correct")
        return "joint_correct" if right else "joint"

    def measure(self, row: str, column: str, name: str) -> dict[str, Any] | None:
        """One estimate, or ``None`` where the cell or the measure is missing."""
        cell = self.cells.get((row, column))
        found = cell.get("measures", {}).get(name) if cell and cell["status"] == "done" else None
        return found if found and found["value"] is not None else None

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
        evaluation=Evaluation(**known["evaluation"]),
        source=known,
    )
    return experiment, {name: Words(*words) for name, words in known["words"].items()}
