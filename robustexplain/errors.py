"""Errors and warnings of RobustExplain."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


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
        # Of dotted names, those that end in it come first: ``layer3`` for ``net.layer3``.
        ends = [known for known in self.known if name and known.endswith(f".{name}")]
        near = list(dict.fromkeys([*ends, *difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)]))[:3]
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


class RunBusyError(InputError):
    """A run directory that another process writes; the message says which one."""


class DamagedFileError(InputError):
    """A file of a run or of a saved system that cannot be read, or was changed since it was written; it is named."""


@contextmanager
def at_work(what: str) -> Iterator[None]:
    """Within the block warnings on the command line name this work."""
    token = _UNDER_WAY.set((*_UNDER_WAY.get(), what))
    try:
        yield
    finally:
        _UNDER_WAY.reset(token)


def under_way() -> str:
    """The work that is being done, from the outside in, each followed by a colon; nothing if none was named."""
    return "".join(f"{what}: " for what in _UNDER_WAY.get())


_UNDER_WAY: ContextVar[tuple[str, ...]] = ContextVar("under_way", default=())


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Work that is named by warnings, and by an error that is no ``InputError``, as what was being done meanwhile."""
    try:
        with at_work(what):
            yield
    except InputError:
        raise
    except Exception as error:
        # What add_note writes, which Python 3.10 has not.
        error.__notes__ = [what, *getattr(error, "__notes__", ())]
        raise


def recorded(error: BaseException) -> str:
    """The traceback of an error as text that ends with the error; what was being done stands at the beginning."""
    told = traceback.TracebackException.from_exception(error)
    vars(told)["__notes__"] = None  # Python 3.11 and later would write them behind the error
    notes = [f"while {note}:\n" for note in getattr(error, "__notes__", ())]
    return "".join([*notes, *told.format()])


def memory_advice(text: str) -> str:
    """What to do about an error with this text, if it says that memory does not suffice; otherwise nothing."""
    short = re.search("MemoryError|out of memory|can(no|')t allocate memory|not enough memory", text, re.IGNORECASE)
    return "lower evaluation.batch_size, or a training's batch_size or micro_batch" if short else ""


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


class DataWarning(RobustExplainWarning):
    """Something about the data that may not be meant: files left out, a class missing from a part, copies."""


class PartlySmoothedWarning(RobustExplainWarning):
    """Smoothing replaces a network's rectifiers, and other activations with kinks stay as they are."""
