"""Which system each adversary attacks, and by which attack; equal attacks on equal systems share their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .. import files
from ..attacks import Attack, Known
from ..attacks.known import NOTHING
from ..errors import recorded
from ..fingerprint import fingerprint
from ..interpreters import Interpreter
from ..recipe.experiment import Column, Experiment, Row
from ..system import System, on_model
from .cell import Rule
from .origins import Origins
from .prepared import Prepared


@dataclass(frozen=True)
class Job:
    """Attacked inputs to compute: an attack and the system that the adversary runs it on.

    Args:
        name: the name that the inputs are stored under; jobs that give the same inputs have the same name.
        attack: the attack, adapted if the adversary is adaptive.
        system: the system that is attacked.
    """

    name: str
    attack: Attack
    system: System


class Adversaries:
    """The jobs of an experiment's cells.

    Args:
        experiment: rows and columns.
        prepared: its systems.
        origins: of the experiment.
        rule: what makes a map of a row plausible; ``None``: nobody knows.
    """

    def __init__(
        self,
        experiment: Experiment,
        prepared: Prepared,
        origins: Origins,
        rule: Callable[[Row], Rule] | None = None,
    ) -> None:
        self.experiment, self.prepared, self.origins, self.rule = experiment, prepared, origins, rule
        self._views: dict[str, tuple[System, str]] = {}
        self._jobs: dict[tuple[str, str], Job] = {}

    def job(self, row: Row, column: Column) -> Job:
        """The job of the column's adversary when this row is deployed."""
        key = row.label, column.label
        if key not in self._jobs:
            self._jobs[key] = self._job(row, column)
        return self._jobs[key]

    def _job(self, row: Row, column: Column) -> Job:
        attack, (target, where) = column.attack, self._target(row, column)
        if column.source is None and column.knowledge == "adaptive":
            attack = attack.adapted(target)
        # An attack that uses neither maps nor a detector's score depends on the classifier alone and is shared by it.
        owner = self._owner(target.model)
        if not attack.needs_maps and target.detector is None and owner is not None:
            where = f"on the classifier {owner}"
        # Which inputs are judged depends on all systems of the experiment: with one more, others may be.
        judged = self.experiment.source.get("judged")
        told = self._told(row, column)
        informed = attack.informed(told)
        # Rows with other limits get other inputs, from an attack that stops at its limit.
        limit = [] if informed is attack else [told.limit, fingerprint(told.distance), told.root is not None]
        settings = files.digest([fingerprint(attack), column.goal_map, judged, *self.origins.pool(column), *limit])
        return Job(f"{type(attack).__name__} {settings} {where}", informed, target)

    def _told(self, row: Row, column: Column) -> Known:
        """What the adversary may know besides the system: only one who knows the defense knows how it is judged."""
        if column.knowledge != "adaptive" or column.source is not None or self.rule is None:
            return NOTHING
        rule = self.rule(row)
        root = None if row.label == row.root else self.prepared.by_row.get(row.root)
        distance = NOTHING.distance if rule.distance is None else rule.distance
        return Known(distance, rule.limit, root if root is None else root.without_detector())

    def failure(self, row: Row, column: Column) -> str | None:
        """Why a system could not be built, the evaluated or the attacked one, or the attack not adapted to it.

        Returns:
            The traceback; ``None`` if nothing went wrong.
        """
        failures = self.prepared.failures
        failed = failures.get(row.label) or failures.get(column.source or row.label)
        if failed is None:
            try:
                self.job(row, column)
            except Exception as error:
                # An attack that cannot be adapted to one system must not take the other cells with it.
                failed = recorded(error)
        return failed

    def _target(self, row: Row, column: Column) -> tuple[System, str]:
        if column.source is not None:
            return self.prepared.by_row[column.source], f"on {self._named(column.source)}"
        if column.knowledge == "transfer":
            return self._transfer(row)
        if column.knowledge == "adaptive":
            return self.prepared.by_row[row.label], f"on {self._named(row.label)}"
        return self.oblivious(row)

    def _transfer(self, row: Row) -> tuple[System, str]:
        """The system that a transfer adversary trains; where it equals the deployed one, the inputs are shared."""
        replica = self.prepared.replicas[row.root]
        known, where = self.oblivious(self.experiment.row(row.root))
        return (known, where) if _same(replica, known) else (replica, f"from {self._named(row.root)}")

    def oblivious(self, row: Row) -> tuple[System, str]:
        """The deployed system as an attacker without knowledge of the defense assumes it to be, and a name for it."""
        if row.label not in self._views:
            self._views[row.label] = self._oblivious(row)
        return self._views[row.label]

    def _oblivious(self, row: Row) -> tuple[System, str]:
        view = self.prepared.by_row[row.label]
        if row.kind != "defense" or not row.derived:  # a defense that brings its interpreter may be a root
            return view if view.detector is None else view.without_detector(), f"on {self._named(row.label)}"
        plain = self.oblivious(self.experiment.undefended(row))[0]
        for step in self._defenses(row):
            view = oblivious_view(step.settings, view, plain)
        below, where = self.oblivious(self.experiment.row(row.base))
        return (below, where) if _same(view, below) else (view, f"on {self._named(row.label)}, taken for undefended")

    def _defenses(self, row: Row) -> Iterator[Row]:
        """The rows of the stacked defenses, the last one first."""
        while row.derived and row.kind == "defense":
            yield row
            row = self.experiment.row(row.base)

    def _owner(self, model: nn.Module) -> str | None:
        """The first row that deploys a classifier, otherwise the first whose transfer attacker has it."""
        known = {label: system for label, system in self.prepared.by_row.items() if system.model is model}
        replicas = {label: system for label, system in self.prepared.replicas.items() if system.model is model}
        owner = next(iter(known), None) or next(iter(replicas), None)
        if owner is None:
            return None
        return self._named(owner) if owner in known else f"of the attacker of {self._named(owner)}"

    def _named(self, label: str) -> str:
        """A row's label with its fingerprint: inputs of a row that changed are not taken for its own."""
        return f"{label} {self.origins.row(label)[:8]}"


def oblivious_view(defense: Any, defended: System, root: System) -> System:
    """A defended system as an attacker without knowledge of the defense assumes it to be.

    Args:
        defense: the last defense, which may define this view itself; ``None`` where it is unknown.
        defended: the system with it.
        root: the undefended system.
    """
    if defense is not None:
        view: System = defense.oblivious_view(defended, root)
        return view
    if defended.model is root.model:
        return root if root.detector is None else root.without_detector()
    return System(defended.model, on_model(root.interpreter, defended.model))


def _same(a: System, b: System) -> bool:
    return a.model is b.model and a.detector is b.detector and _alike(a.interpreter, b.interpreter)


def _alike(a: Any, b: Any) -> bool:
    """Whether two interpreters, or their fields, are the same: by value, networks and tensors by identity."""
    if a is b:
        return True
    if isinstance(a, Interpreter) and type(a) is type(b):
        return all(_alike(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(map(_alike, a, b))
    return isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b
