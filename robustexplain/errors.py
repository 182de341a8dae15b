"""Errors and warnings of RobustExplain."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input; the message says what was wrong, what was expected and the offending value."""


class FieldError(InputError):
    """An invalid value of a component's field; ``field`` is its name."""

    def __init__(self, component: str, field: str, problem: str) -> None:
        self.field, self.problem = field, problem
        super().__init__(f"{component}.{field} {problem}")


class UnknownNameError(InputError):
    """A name that no registry knows; the message lists the nearest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {_some(self.known)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


def _some(names: list[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class UnsupportedModelError(InputError):
    """A model that a method cannot cover. It is refused rather than explained wrongly in silence."""


class NotDifferentiableError(InputError):
    """An attack or a defense needs the gradient of maps that have none."""


class MissingDataError(InputError):
    """A data set or a weights file that is not on this machine; the message says how to get it."""


class RunMismatchError(InputError):
    """A run directory that was made by another recipe, version, data set or set of weights."""


class RobustExplainWarning(UserWarning):
    """Something that looks like robustness and may not be."""


class ZeroDirectionWarning(RobustExplainWarning):
    """A search has no direction: its failure would say nothing about the defense."""


class ZeroMapGradientWarning(ZeroDirectionWarning):
    """An attack follows a map whose gradient is zero: its failure would say nothing about the defense."""


class SaturatedWarning(RobustExplainWarning):
    """A map of a probability that rounds to 0 or 1: it is zero, or says nothing."""


class FoolingFailedWarning(RobustExplainWarning):
    """An attack on a model changed nothing: its failure would say nothing about the interpreter."""


class FewScoresWarning(RobustExplainWarning):
    """An alarm that is calibrated on too few clean inputs to know its share of false alarms."""
