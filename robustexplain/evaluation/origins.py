"""What a cell was made of: fingerprints of its row, its column, its metrics and the inputs that are judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from ..fingerprint import fingerprint
from ..recipe.experiment import Column, Experiment, Recipe, Row, foundation
from ..recipe.rows import standing_on
from ..seals import sha256_of


class Origins:
    """Fingerprints of an experiment's parts, each taken once; two of one fingerprint give the same results.

    They hold for one foundation (data, model, seed, which inputs are judged) and one version.

    Args:
        experiment: rows, columns, metrics; columns of tables by their places.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.metrics = {name: fingerprint(metric) for name, metric in experiment.metrics.items()}
        self._by_label = {row.label: row for row in experiment.rows}
        self._rows: dict[str, str] = {}
        self._columns: dict[str, str] = {}

    def row(self, label: str) -> str:
        """Of a row: all that it stands on, settings included, or the system that was handed in for each."""
        if label not in self._rows:
            systems = self.experiment.source.get("systems", {})
            chain = list(standing_on(self._by_label[label], self._by_label))
            made = [[row.kind, row.base, row.name, fingerprint(row.settings), systems.get(row.label)] for row in chain]
            started = [found for row in chain if (found := _started(row.settings)) is not None]
            self._rows[label] = files.digest([made, started] if started else made)
        return self._rows[label]

    def system(self, label: str) -> str:
        """Of a row's saved system: the row, and the foundation that it was made on."""
        return files.digest([self.row(label), foundation(self.experiment.source)])

    def column(self, column: Column) -> str:
        """Of a column: the attack, what its adversary knows and wants, and the row that it is crafted on."""
        if column.label not in self._columns:
            source = None if column.source is None else self.row(column.source)
            made = [fingerprint(column.attack), column.knowledge, column.goal_map, source]
            self._columns[column.label] = files.digest([*made, *self.pool(column)])
        return self._columns[column.label]

    def pool(self, column: Column) -> list[str]:
        """Of the adversary's own inputs, where the column asks for them and the data set has no digest of its own."""
        pool = self.experiment.source.get("pool")
        if pool is None:
            return []
        return [pool] if column.goal_map == "random-class" or column.attack.needs_data else []

    def cell(self, row: Row, column: Column) -> dict[str, Any]:
        """What a cell's JSON keeps of what it was made of."""
        return {
            "row": self.row(row.label),
            "column": self.column(column),
            "metrics": self.metrics,
            "inputs": self.experiment.source.get("judged"),
        }

    def calibration(self, label: str) -> str:
        """Of a row's calibration: the row, and which inputs are judged, beyond which it has its own."""
        return files.digest([self.row(label), self.experiment.source.get("judged")])

    def audit(self, label: str) -> str:
        """Of a manipulated row's audit: every other interpreter looks at it, and its intervals are in it."""
        looking = [self.row(row.label) for row in self.experiment.rows if row.kind != "manipulation"]
        return files.digest([self.row(label), looking, self.experiment.evaluation.bootstrap])

    @property
    def summary(self) -> str:
        """Of how cells are summed up from their arrays."""
        return files.digest([self.experiment.evaluation.bootstrap, self.metrics])


def _started(settings: Any) -> str | None:
    """A hash of the file whose weights a training starts with; ``None`` where it starts afresh."""
    start = settings.get("start") if isinstance(settings, Mapping) else getattr(settings, "start", None)
    if not isinstance(start, str):
        return None
    path = Path(start).expanduser()
    path = path / "weights.safetensors" if path.is_dir() else path
    return _sha256(path) or "no file"


def weights_file(experiment: Experiment) -> str | None:
    """The SHA-256 of the file with a recipe's classifier's weights; ``None`` where there is none."""
    if not isinstance(experiment, Recipe) or experiment.model.weights is None:
        return None
    return _sha256(Path(experiment.model.weights).expanduser())


def _sha256(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None
