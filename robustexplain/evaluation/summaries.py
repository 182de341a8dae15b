"""From a cell's arrays to what its JSON says: every measure with its interval."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import files
from ..fingerprint import fingerprint
from ..random_streams import derive
from ..recipe.experiment import Column, Experiment, Row
from .calibration import Calibration
from .differences import difference
from .origins import Origins
from .statistics import UNBOUNDED, UNIT, estimate, separation
from .store import RunFolder

PICTURES = ("x", "attacked_x", "map", "attacked_map", "goal_map", "certificate", "attacked_certificate")
LABELS = ("sample", "label", "prediction", "goal_class", "member")
KEPT = ("made_of", "machine", "members", "raised")
"""What a cell says that does not follow from its arrays and today's settings."""
SHARES = (
    *("success", "joint", "plausible", "joint_iou", "plausible_iou", "success_correct", "joint_correct", "correct"),
    *("alarm", "zero_direction", "stalled", "surrogate_misled"),
)
"""Measures of 0 and 1, whose intervals are exact, besides the metrics that say that they are."""

FRACTIONS = ("confidence", "certified_one", "certified_zero", "certified_overlap", "contradicted")
"""Measures between 0 and 1 that are not shares."""

LENGTHS = ("queries", "perturbation", "certified_radius")
"""Measures that are not negative."""


class Summaries:
    """Sums cells up.

    Args:
        experiment: rows, columns, metrics, how many resamples.
        folder: its directory, whose cells are compared with one another.
        origins: of the experiment.
        machine: what new cells are made on, in words.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, origins: Origins, machine: str = "") -> None:
        self.experiment, self.folder, self.origins, self.machine = experiment, folder, origins, machine

    def of(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> dict[str, Any]:
        """What a cell's JSON says of its arrays, those of the experiment's metrics alone."""
        resamples, seed = self.experiment.evaluation.bootstrap, derive(self.experiment.seed, "statistics")
        measures = {
            name: estimate(value, self.binary(name), resamples, seed).as_dict()
            for name, value in arrays.items()
            if name not in PICTURES and name not in LABELS
        }
        if "score" in arrays:
            measures["auc"] = separation(arrays["clean_score"], arrays["score"]).as_dict()
        separations = self._separations(row, arrays)
        if known := [e for e in separations if e is not None]:
            measures["separation"] = min(known, key=lambda e: e["value"] or 0.0)
        hits = arrays["success"] > 0
        return {
            "status": "done",
            **self.where(row, column),
            "measures": measures,
            "separation_by": separations,
            "joint_by_limit": self._by_limit(row, column, arrays),
            "on_successes": {
                name: estimate(arrays[name][hits], self.binary(name), resamples, seed).as_dict()
                for name in self.experiment.metrics
            },
            "against_undefended": self._against(row, column, arrays),
            "summary": self.origins.summary,
            **self._members(column, arrays),
        }

    def _members(self, column: Column, arrays: dict[str, Tensor]) -> dict[str, Any]:
        """For an ensemble, how many of the samples that fell each of its members won."""
        names: tuple[str, ...] = getattr(column.attack, "names", ())
        if "member" not in arrays or not names:
            return {}
        won = arrays["member"][arrays["joint"] > 0]
        return {"members": {name: int((won == place).sum()) for place, name in enumerate(names)}}

    def _by_limit(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> list[float | None] | None:
        """Joint success if the row's limit were at either end of its range; ``None`` where no limit decides it.

        Of a system that is random: the distance of its first draw.
        """
        known = self.folder.calibrated(row.label)
        limit, ends = (None, []) if known is None else (known[0]["limit"], known[0].get("limit_range", []))
        if limit is None or "distance" not in arrays or "joint_iou" not in arrays:
            return None
        won = arrays["success"] > 0
        won = won & (arrays["alarm"] == 0) if "alarm" in arrays else won
        # An attack that moves the map wins where it is not near.
        moves: bool = column.attack.moves_map
        at = (None if end is None else (arrays["distance"] <= end) ^ moves for end in ends)
        return [None if plausible is None else float((won & plausible).double().mean()) for plausible in at]

    def where(self, row: Row, column: Column) -> dict[str, Any]:
        """Which cell it is, and what it was made of."""
        words = {"row": row.label, "base": row.base, "column": column.label, "knowledge": column.knowledge}
        words["attack"] = files.digest([fingerprint(column.attack), column.goal_map, column.source])
        return {**words, "made_of": self.origins.cell(row, column), "machine": self.machine}

    def refresh(self) -> None:
        """Sum up again, from their arrays, the cells that have other resamples, or metrics that are not asked for."""
        for row in self.experiment.rows:
            for column in self.experiment.columns:
                cell = self.folder.done(row.label, column.label)
                if cell is not None and cell["summary"] != self.origins.summary:
                    arrays = self._asked(self.folder.arrays(row.label, column.label), cell["made_of"]["metrics"])
                    # The arrays keep what was measured: a metric that comes back is not measured again.
                    kept: dict[str, Any] = {name: cell[name] for name in KEPT if name in cell}
                    found = {**self.of(row, column, arrays), **kept}
                    self.folder.write_cell(row.label, column.label, found, None)

    def _asked(self, arrays: dict[str, Tensor], measured: dict[str, str]) -> dict[str, Tensor]:
        """The arrays without those of metrics that are not asked for (``l1``, ``l1_goal``, ``l1_honest``)."""
        kept = {}
        for name, value in arrays.items():
            owners = [metric for metric in measured if name == metric or name.startswith(f"{metric}_")]
            if not owners or max(owners, key=len) in self.experiment.metrics:
                kept[name] = value
        return kept

    def compare_late(self) -> None:
        """Compare the defended cells that were made while the undefended one was still a hole."""
        for row in self.experiment.rows:
            for column in self.experiment.columns:
                cell = self.folder.done(row.label, column.label)
                if cell is None or cell["against_undefended"]:
                    continue
                found = self._against(row, column, self.folder.arrays(row.label, column.label))
                if found:
                    self.folder.write_cell(row.label, column.label, {**cell, "against_undefended": found}, None)

    def _against(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> dict[str, Any]:
        """Paired differences to the undefended row: the same images under the same attacker."""
        reference = self.experiment.reference(row)
        if not row.derived or self.folder.done(reference.label, column.label) is None:
            return {}
        plain = self.folder.arrays(reference.label, column.label)
        names = (*self.experiment.metrics, "distance", "joint_iou")
        names = (*names, "success", "joint", "success_correct", "joint_correct")
        resamples, seed = self.experiment.evaluation.bootstrap, derive(self.experiment.seed, "paired")
        return {
            n: difference(arrays[n], plain[n], self.binary(n), resamples, seed).as_dict()
            for n in names
            if n in plain and n in arrays
        }

    def binary(self, name: str) -> bool:
        """Whether a measure is 0 or 1, where no draws are averaged."""
        return name in SHARES or name.endswith("_nearer") or getattr(self.experiment.metrics.get(name), "binary", False)

    def bounds(self, name: str) -> tuple[float, float]:
        """The smallest and the largest value that a sample's measure can have."""
        if name == "distance":
            least, most = (metric := self.experiment.evaluation.plausible.metric).bounds
            return (0.0, most - least) if metric.higher_is_closer else (least, most)
        if self.binary(name) or name in FRACTIONS or self.binary(name.removesuffix("_mean")):
            return UNIT
        if name in LENGTHS:
            return (0.0, float("inf"))
        owners = [metric for metric in self.experiment.metrics if name == metric or name.startswith(f"{metric}_")]
        return self.experiment.metrics[max(owners, key=len)].bounds if owners else UNBOUNDED

    def _separations(self, row: Row, arrays: dict[str, Tensor]) -> list[dict[str, Any] | None]:
        """How well the distances of attacked maps are told from those that each kind of harmless change makes."""
        known = self.folder.calibrated(row.label)
        if known is None or "distance" not in arrays:
            return []
        found = Calibration.read(*known).separations(arrays["distance"])
        return [None if e is None else e.as_dict() for e in found]
