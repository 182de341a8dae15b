"""Why a cell is not to be believed: each flag with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..fingerprint import fingerprint
from ..recipe.auditing import Auditing
from ..recipe.experiment import Column, Experiment, Row
from ..registry import ATTACKS
from .differences import mcnemar
from .origins import Origins
from .planting import planted_of, unproven
from .probing import FROZEN, ITERATES, RANDOM, Probes
from .row_flags import Flag, RowAudit, flag
from .seeds import repeats
from .store import RunFolder
from .sweeps import sweeps


def write_flags(experiment: Experiment, folder: RunFolder) -> None:
    """Audit every finished cell; store its flags in it, and what was found of what was planted."""
    audit = Audit(experiment, folder, Probes(experiment, folder, Origins(experiment)))
    for row in experiment.rows:
        for column in experiment.columns:
            cell = folder.done(row.label, column.label)
            if cell is None:
                continue
            flags = audit.flags(row, column)
            flags += _of_repeats(experiment, folder, row, column, {found["name"] for found in flags})
            now = {**cell, "flags": flags, "planted": planted_of(audit.probes, row, column)}
            if now != cell:
                folder.write_cell(row.label, column.label, now, None)


def _of_repeats(experiment: Experiment, folder: RunFolder, row: Row, column: Column, known: set[str]) -> Iterator[Flag]:
    """Flags that a cell has under other seeds alone: its figures are of all of them."""
    for i, other in enumerate(repeats(experiment, folder)[1:], 2):
        for found in (other.done(row.label, column.label) or {}).get("flags", []):
            if found["name"] not in known:
                known.add(found["name"])
                yield flag(found["name"], f"in training {i}: {found['reason']}")


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
        found = [*RowAudit(self.folder, self.probes).flags(row), *self._failed(self.probes.rows_of(row))]
        if column.facts.clean:
            return found
        arrays = self.folder.arrays(row.label, column.label)
        if not column.facts.control:
            found += [
                *self._search(row, column, arrays),
                *self._undefended(row, column),
                *self._random(row, column, arrays),
            ]
            found += [*self._transfer(row, column, arrays), *self._black_box(row, column, arrays)]
            found += [*self._stronger(row, column, "alarm" in arrays), *self._controls(row, column, arrays)]
            found += self._failed(self.probes.cells_of(row, column))
            found += [flag("attack-not-proven", why) for why in unproven(self.probes, row, column)]
            found += self._smaller(row, column, arrays)
        return found

    def _failed(self, names: dict[str, str]) -> Iterator[Flag]:
        """Checks that broke: of them nothing is known."""
        for what, name in names.items():
            if (why := self.probes.error(name)) is not None:
                yield flag("not-audited", f"the audit could not check {what}: {why}")

    def _search(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """What the search says of itself where it did not win, and how long it is."""
        won = arrays["joint" if column.facts.needs_maps else "success"] > 0
        n, zero = len(won), int(((arrays["zero_direction"] > 0) & ~won).sum())
        if zero:
            yield flag(
                "zero-gradient",
                f"the search's first gradient was exactly zero for {zero} of {n} that it did not win: it is masked",
            )
        words = {
            "stalled": "the search never got its objective below where it began",
            "surrogate_misled": "the surrogate that the search followed improved and the real system did not",
        }
        for name, what in words.items():
            count = int(((arrays[name] > 0) & ~won).sum())
            if count > self.settings.stalled * n:
                yield flag(name.replace("_", "-"), f"{what}, for {count} of {n} that it did not win")
        steps = getattr(self.probes.attack(row, column), "steps", None)
        if isinstance(steps, int) and 0 < steps < self.settings.few_steps:
            yield flag(
                "few-steps", f"the attack takes {steps} steps, and fewer than {self.settings.few_steps} seldom converge"
            )

    def _undefended(self, row: Row, column: Column) -> Iterator[Flag]:
        """An attack that fails on the undefended system says nothing about a defense."""
        if column.knowledge == "transfer" or column.source is not None:
            return
        plain = self.folder.done(self.experiment.reference(row).label, column.label)
        if plain is None:
            return
        found, least = (
            plain["measures"]["joint" if column.facts.keeps_prediction else "success"],
            self.settings.undefended,
        )
        # As of false alarms, only what is beyond chance is said: 24 of 30 may be an attack that wins nine tenths.
        if found["value"] is not None and found["high"] < least:
            yield flag(
                "undefended-weak",
                f"the attack succeeds on {found['value']:.0%} [{found['low']:.0%}, {found['high']:.0%}] of the "
                f"undefended system {plain['row']}, and a strong one on at least {least:.0%}: what it does not reach "
                "says nothing about a defense",
            )

    def _random(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """Random perturbations that do as well as the attack."""
        name = "distance" if column.facts.keeps_prediction else "success"
        for other in self.experiment.columns:
            if not other.facts.control or other.facts.clean or name not in arrays:
                continue
            if self.folder.done(row.label, other.label) is None or _larger(other, column):
                continue
            control = self.folder.arrays(row.label, other.label)[name]
            yield from self._as_good(f"{other.label!r}, random perturbations,", name, arrays[name], control)

    def _as_good(self, who: str, name: str, mine: Tensor, control: Tensor) -> Iterator[Flag]:
        """A control that does nearly as much as the attack, where that has not won nearly everything."""
        attack, chance, factor = float(mine.nanmean()), float(control.nanmean()), self.settings.random_factor
        enough = name == "success" and attack >= self.settings.undefended
        if chance > 0 and attack < factor * chance and not enough:
            what = "moves maps by" if name == "distance" else "misleads the classifier for a share of"
            yield flag(
                "random-as-good",
                f"{who} {what} {chance:.3g}, and the attack {attack:.3g}: less than {factor:g} times as much",
            )

    def _transfer(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """The same attack that does better without knowledge of the defense."""
        if column.knowledge != "adaptive":
            return
        for other in self._same_attack(column):
            if other.knowledge == "adaptive" or self.folder.done(row.label, other.label) is None:
                continue
            if told := self._outdone(row, other.label, arrays, "joint", self.settings.transfer_gap):
                yield flag(
                    f"{other.knowledge}-stronger",
                    f"{other.label!r}, the same attack without knowledge of the defense, {told}: it is not the "
                    "strongest one",
                )

    def _black_box(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """An attack that uses gradients, and one of the same aim and ball without them that does better."""
        if not _uses_gradients(column.attack):
            return
        for other in self.experiment.columns:
            aims = [(c.facts.keeps_prediction, c.facts.needs_maps, c.goal_map, c.facts.norm) for c in (column, other)]
            larger = (other.facts.eps or 0) > (column.facts.eps or 0)
            if other.facts.control or _uses_gradients(other.attack) or aims[0] != aims[1] or larger:
                continue
            if other.source is not None or self.folder.done(row.label, other.label) is None:
                continue
            if other.knowledge == "adaptive" and column.knowledge != "adaptive":
                continue  # what it wins more, it may win by what it knows
            won = "joint" if column.facts.needs_maps else "success"
            if told := self._outdone(row, other.label, arrays, won, self.settings.transfer_gap):
                yield flag(
                    "black-box-stronger",
                    f"{other.label!r}, which sees no gradient, {told}: the gradients are masked",
                )

    def _controls(self, row: Row, column: Column, arrays: dict[str, Tensor]) -> Iterator[Flag]:
        """An attack beside many random draws, and against a classifier whose draws are frozen."""
        names, limits = self.probes.names(row, column), self.settings
        found = self.probes.read(self.probes.cell(row, column, RANDOM)) if RANDOM in names else None
        for name, best in (found or {}).items():
            if len(best) and name in arrays:
                who = f"of {len(best)} inputs the best of {limits.draws} random perturbations"
                yield from self._as_good(who, name, arrays[name][: len(best)], best)
        found = self.probes.read(self.probes.cell(row, column, FROZEN)) if FROZEN in names else None
        if found is not None and len(found["success"]) and float(found["success"].mean()) < limits.fixed_noise:
            yield flag(
                "fixed-noise",
                f"with its draws frozen the classifier is misled for {float(found['success'].mean()):.0%} of "
                f"{len(found['success'])} inputs only: what resists is not its randomness, but a weak attack",
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
                less = {"eps": "a smaller eps", "steps": "fewer steps"}[sweep.setting]
                if told := self._outdone(row, other, arrays, "joint", self.settings.eps_loss):
                    yield flag(
                        "not-monotone",
                        f"{other!r}, the same attack with {less}, {told}: the search fails where more is allowed",
                    )

    def _outdone(self, row: Row, other: str, arrays: dict[str, Tensor], won: str, most: float) -> str | None:
        """In words, that another column of the row wins more, by over ``most`` and beyond chance; else ``None``."""
        theirs, mine = self.folder.arrays(row.label, other)[won], arrays[won]
        more, fewer = int((theirs > mine).sum()), int((theirs < mine).sum())
        if (more - fewer) / len(mine) <= most or mcnemar(more, fewer) >= self.settings.significance:
            return None
        return f"wins {float(theirs.mean()):.2f} and this one {float(mine.mean()):.2f}"

    def _stronger(self, row: Row, column: Column, watched: bool) -> Iterator[Flag]:
        """An attack that wins more with more steps, eps or restarts, or that does not return what it found."""
        for name in self.probes.names(row, column):
            if name == ITERATES:
                yield from self._lost(row, column, watched)
            elif (known := self.probes.gain(row, column, name)) is not None:
                yield from self._gains(name, *known)

    def _lost(self, row: Row, column: Column, watched: bool) -> Iterator[Flag]:
        found = self.probes.read(self.probes.cell(row, column, ITERATES))
        lost = 0 if found is None else int((found["won"] > found["success"]).sum())
        # With a detector in its way, an attack may rather return what raises no alarm.
        if found is not None and lost and not watched:
            yield flag("silent-success", f"for {lost} of {len(found['won'])} an iterate won and was not returned")

    def _gains(self, name: str, before: Tensor, after: Tensor) -> Iterator[Flag]:
        limits, gain, value = self.settings, float((after - before).mean()), float(after.mean())
        told = f"{float(before.mean()):.2f} to {value:.2f} of {len(after)}"
        if name == "steps" and gain > limits.steps_gain:
            yield flag("needs-more-steps", f"twice the steps take it from {told}: it has not converged")
        if name == "restarts" and gain > limits.restarts_gain:
            yield flag("needs-restarts", f"five restarts take it from {told}: one run is not enough")
        if name == "eps" and -gain > limits.eps_loss:
            yield flag("not-monotone", f"twice the eps takes it from {told}: the search fails where more is allowed")
        if name == "unbounded" and value < limits.unbounded:
            yield flag("unbounded-fails", f"with eps 1 it reaches only {value:.2f} of {len(after)}")


def _larger(control: Column, column: Column) -> bool:
    """Whether a control may change more than an attack, or nobody can tell."""
    mine, theirs = column.facts.eps, control.facts.eps
    if mine is None or theirs is None:
        return False
    return theirs > mine or (column.facts.norm or "linf") != (control.facts.norm or "linf")


def _uses_gradients(attack: Any) -> bool:
    """Whether a registered attack follows gradients; those of somebody's own are taken to."""
    known = [entry.needs for entry in ATTACKS if entry.build is type(attack)]
    return not known or "gradients" in known[0]
