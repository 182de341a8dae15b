"""The contents of a run directory: the experiment, its cells and the costs of its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import InputError
from ..recipe import check
from ..recipe.experiment import AttackFacts, Column, Evaluation, Experiment, Recipe, Row
from ..schema import make
from .store import EXPERIMENT, RECIPE, RUN, RunFolder
from .words import Words, words_of


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
    """

    experiment: Experiment
    run: dict[str, Any]
    cells: dict[tuple[str, str], dict[str, Any] | None]
    rows: dict[str, dict[str, Any]]
    words: dict[str, Words]
    calibrations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: RunFolder) -> Results:
        """Read the results of a run, finished or not."""
        path = folder.root / RECIPE
        if path.is_file():
            experiment: Experiment = check(yaml.safe_load(path.read_text(encoding="utf-8")))
            words = words_of(experiment.metrics)
        else:
            experiment, words = read_back(folder)
        run = json.loads((folder.root / RUN).read_text(encoding="utf-8"))
        rows, columns = experiment.rows, experiment.columns
        cells = {(r.label, c.label): folder.read_cell(r.label, c.label) for r in rows for c in columns}
        costs = {r.label: folder.row(r.label) for r in rows}
        read = {label: json.loads(path.read_text(encoding="utf-8")) for label, path in costs.items() if path.is_file()}
        known = {row.label: found[0] for row in rows if (found := folder.calibrated(row.label)) is not None}
        return cls(experiment, run, cells, read, words, known)

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


def read_back(folder: RunFolder) -> tuple[Experiment, dict[str, Words]]:
    """An experiment whose systems and attacks came from Python, for a report, and its measures' words."""
    known = json.loads((folder.root / EXPERIMENT).read_text(encoding="utf-8"))
    rows = tuple(Row(**{**row, "settings": None}) for row in known["rows"])
    columns = tuple(Column(**{**column, "attack": AttackFacts(**column["attack"])}) for column in known["columns"])
    experiment = Experiment(
        name=folder.root.name,
        about=known["about"],
        seed=known["seed"],
        rows=rows,
        columns=columns,
        metrics=dict.fromkeys(known["metrics"]),
        evaluation=make(Evaluation, known["evaluation"], "evaluation"),
        source=known,
    )
    return experiment, {name: Words(*words) for name, words in known["words"].items()}
