"""Why a cell is not to be believed: each flag with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..recipe.auditing import Auditing
from ..recipe.experiment import Column, Experiment, Row
from .calibration import ROUNDING
from .differences import mcnemar
from .fingerprint import fingerprint
from .origins import Origins
from .probing import ITERATES, Probes
from .store import RunFolder
from .sweeps import sweeps

Flag = dict[str, str]
"""``name`` and ``reason``."""


def flag(name: str, reason: str) -> Flag:
    """A flag as it stands in a cell."""
    return {"name": name, "reason": reason}


def write_flags(experiment: Experiment, folder: RunFolder) -> None:
    """Audit every finished cell, and store its flags in it (``flags``)."""
    audit = Audit(experiment, folder, Probes(experiment, folder, Origins(experiment)))
    for row in experiment.rows:
        for column in experiment.columns:
            cell = folder.done(row.label, column.label)
            if cell is None:
                continue
            found = audit.flags(row, column)
            if found != cell.get("flags"):
                folder.write_cell(row.label, column.label, {**cell, "flags": found}, None)


@dataclass(frozen=True)
class Audit:
    """The audit of an experiment's cells, from what its directory holds.

    Args:
        experiment: rows, columns and thresholds.
        folder: its directory.
        probes: what was run for the audit.
    """

    experiment: Experiment
    folder: RunFolder
    probes: Probes

    @property
    def settings(self) -> Auditing:
        """Thresholds."""
        return self.experiment.audit

    def flags(self, row: Row, column: Column) -> list[Flag]:
        """The flags of a finished cell. Nothing is claimed of unchanged inputs but what is the system's own."""
        found = [*self._system(row)]
        if column.facts.name == "Clean":
            return found
        arrays = self.folder.arrays(row.label, column.label)
        if not column.facts.control:
            found += [*self._search(column, arrays), *self._undefended(row, column), *self._random(row, column, arrays)]
            found += [*self._transfer(row, column, arrays), *self._stronger(row, column, arrays)]
            found += self._smaller(row, column, arrays)
        return found

    def _system(self, row: Row) -> Iterator[Flag]:
        """Flags of the row's system."""
        known, limits = self.probes.read(self.probes.row(row)), self.settings
        if known is not None:
            output, maps = float(known["output_change"].amax()), float(known["map_change"].amax())
            if output > limits.output_change or maps > limits.map_change:
                yield flag(
                    "random-output",
                    f"the system answers the same input differently (logits by {output:.2g}, maps by {maps:.2g}) and "
                    "does not say that it is random: it is judged on one draw, and no attack averages over them",
                )
            if float(known["softmax"].amin()):
                yield flag(
                    "softmax-output",
                    "the classifier's logits are probabilities: where they saturate, gradients vanish, and attacks "
                    "fail that would succeed on its logits",
                )
            if float(known["constant"].amin()):
                yield flag("constant-map", "all inputs have the same map: it explains nothing, and nothing forges it")
        calibrated = self.folder.calibrated(row.label)
        if calibrated is None:
            return
        distances = calibrated[1]["distance"][calibrated[1]["kept"] > 0]
        if len(distances) and float(distances.abs().amax()) <= ROUNDING:
            yield flag(
                "still-map",
                f"none of {len(distances)} harmless changes moves the map at all: it does not follow the input (a map "
                "that is looked up, or does not depend on it), so that attacks on it prove nothing",
            )
        yield from self._alarms(calibrated[0])

    def _alarms(self, known: dict[str, Any]) -> Iterator[Flag]:
        if known["false_alarms"] is None:
            return
        kinds = [entry["name"] for entry in known["harmless"]]
        rates = [known["false_alarms"]["clean"], *known["false_alarms"]["harmless_by"]]
        for name, rate in zip(["clean inputs", *kinds], rates, strict=True):
            if rate["value"] is not None and rate["low"] > self.settings.false_alarms:
                yield flag(
                    "false-alarms",
                    f"the detector rings for {rate['value']:.0%} of {name} [{rate['low']:.0%}, {rate['high']:.0%}]: it "
                    "does not tell attacks from harmless inputs",
                )

    def _search(self, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """What the search says of itself, and how long it is."""
        n, zero = len(arrays["success"]), int((arrays["zero_direction"] > 0).sum())
        if zero:
            yield flag("zero-gradient", f"the search's first gradient was exactly zero for {zero} of {n}: it is masked")
        words = {
            "stalled": "the search never got its objective below where it began",
            "surrogate_misled": "the surrogate that the search followed improved and the real system did not",
        }
        for name, what in words.items():
            count = int((arrays[name] > 0).sum())
            if count > self.settings.stalled * n:
                yield flag(name.replace("_", "-"), f"{what}, for {count} of {n}")
        steps = getattr(column.attack, "steps", None)
        if isinstance(steps, int) and 0 < steps < self.settings.few_steps:
            yield flag(
                "few-steps", f"the attack takes {steps} steps, and fewer than {self.settings.few_steps} seldom converge"
            )

    def _undefended(self, row: Row, column: Column) -> Iterator[Flag]:
        """An attack that fails on the undefended system says nothing about a defense."""
        if column.knowledge == "transfer" or column.source is not None:
            return
        plain = self.folder.done(self.experiment.reference(row).label, column.label)
        name = "joint" if column.facts.keeps_prediction else "success"
        value = None if plain is None else plain["measures"][name]["value"]
        if value is not None and value < self.settings.undefended:
            yield flag(
                "undefended-weak",
                f"the attack succeeds on {value:.0%} of the undefended system {plain['row']}, and a strong one on at "  # type: ignore[index]
                f"least {self.settings.undefended:.0%}: what it does not reach says nothing about a defense",
            )

    def _random(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """Random perturbations that do as well as the attack."""
        name = "distance" if column.facts.keeps_prediction else "success"
        for other in self.experiment.columns:
            if not other.facts.control or other.facts.name == "Clean" or name not in arrays:
                continue
            if self.folder.done(row.label, other.label) is None:
                continue
            control = float(self.folder.arrays(row.label, other.label)[name].nanmean())
            mine, factor = float(arrays[name].nanmean()), self.settings.random_factor
            enough = name == "success" and mine >= self.settings.undefended
            if control > 0 and mine < factor * control and not enough:
                what = "moves maps by" if name == "distance" else "misleads the classifier for a share of"
                yield flag(
                    "random-as-good",
                    f"{other.label!r}, random perturbations, {what} {control:.3g}, and the attack {mine:.3g}: "
                    f"less than {factor:g} times as much",
                )

    def _transfer(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """The same attack that does better without knowledge of the defense."""
        if column.knowledge != "adaptive":
            return
        for other in self._same_attack(column):
            if other.knowledge == "adaptive" or self.folder.done(row.label, other.label) is None:
                continue
            theirs = self.folder.arrays(row.label, other.label)["joint"]
            more, fewer = int((theirs > arrays["joint"]).sum()), int((theirs < arrays["joint"]).sum())
            gap = (more - fewer) / len(theirs)
            if gap > self.settings.transfer_gap and mcnemar(more, fewer) < self.settings.significance:
                yield flag(
                    f"{other.knowledge}-stronger",
                    f"{other.label!r}, the same attack without knowledge of the defense, wins "
                    f"{float(theirs.mean()):.2f} and this one {float(arrays['joint'].mean()):.2f}: it is not the "
                    "strongest one",
                )

    def _same_attack(self, column: Column) -> Iterator[Column]:
        for other in self.experiment.columns:
            alike = other.label != column.label and (other.goal_map, other.source) == (column.goal_map, column.source)
            if alike and fingerprint(other.attack) == fingerprint(column.attack):
                yield other

    def _smaller(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """The same attack in another column that does better with a smaller eps, or with fewer steps."""
        for sweep in sweeps(self.experiment.columns):
            labels = [other.label for other in sweep.columns]
            for other in labels[: labels.index(column.label)] if column.label in labels else ():
                if self.folder.done(row.label, other) is None:
                    continue
                theirs, mine = self.folder.arrays(row.label, other)["joint"], arrays["joint"]
                more, fewer = int((theirs > mine).sum()), int((theirs < mine).sum())
                lost, less = (more - fewer) / len(mine), {"eps": "a smaller eps", "steps": "fewer steps"}[sweep.setting]
                if lost > self.settings.eps_loss and mcnemar(more, fewer) < self.settings.significance:
                    yield flag(
                        "not-monotone",
                        f"{other!r}, the same attack with {less}, wins {float(theirs.mean()):.2f} and this one "
                        f"{float(mine.mean()):.2f}: the search fails where more is allowed",
                    )

    def _watched(self, row: Row) -> bool:
        known = self.folder.calibrated(row.label)
        return known is not None and known[0]["false_alarms"] is not None

    def _stronger(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """Flags of a full audit."""
        if not self.probes.attacked(column):
            return
        won, limits = "joint" if column.facts.keeps_prediction else "success", self.settings
        for name in self.probes.names(column):
            found = self.probes.read(self.probes.cell(row, column, name))
            if found is None:
                continue
            if name == ITERATES:
                lost = int((found["won"] > found["success"]).sum())
                # With a detector in its way, an attack may rather return what raises no alarm.
                if lost and not self._watched(row):
                    yield flag(
                        "silent-success", f"for {lost} of {len(found['won'])} an iterate won and was not returned"
                    )
                continue
            after, before = found[won], arrays[won][: len(found[won])]
            gain, value = float((after - before).mean()), float(after.mean())
            told = f"{float(before.mean()):.2f} to {value:.2f} of {len(after)}"
            if name == "steps" and gain > limits.steps_gain:
                yield flag("needs-more-steps", f"twice the steps take it from {told}: it has not converged")
            if name == "restarts" and gain > limits.restarts_gain:
                yield flag("needs-restarts", f"five restarts take it from {told}: one run is not enough")
            if name == "eps" and -gain > limits.eps_loss:
                yield flag(
                    "not-monotone", f"twice the eps takes it from {told}: the search fails where more is allowed"
                )
            if name == "unbounded" and value < limits.unbounded:
                yield flag("unbounded-fails", f"with eps 1 it reaches only {value:.2f} of {len(after)}")
