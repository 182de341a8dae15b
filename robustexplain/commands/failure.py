"""What the command says when it fails: one message that names the cause and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from textwrap import shorten

from ..errors import DamagedFileError, InputError, RobustExplainWarning, RunBusyError, memory_advice, under_way

DEBUG = "ROBUSTEXPLAIN_DEBUG"
"""An environment variable that asks for the traceback, as ``--debug`` does."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def wants_traceback() -> bool:
    """Whether the traceback is asked for."""
    return os.environ.get(DEBUG, "") not in ("", "0")


class WarningLines:
    """Warnings as one line each, without the place in the code, for ``warnings.formatwarning``.

    A line names the work that is being done. Of those of one work that differ in numbers alone two are shown; what
    other work was told at length before is cut short.
    """

    shown = 2
    short = 120
    """Characters of a message that was shown in full before."""

    def __init__(self) -> None:
        self._said: Counter[str] = Counter()
        self._whole: set[str] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *place: object) -> str:
        """The line; empty for one that is not shown."""
        kind = "" if issubclass(category, RobustExplainWarning) else f"{category.__name__}: "
        text = f"{kind}{' '.join(str(message).split())}"
        bare = re.sub(r"\d+", "0", text)
        alike = f"{under_way()}{bare}"
        self._said[alike] += 1
        if self._said[alike] > self.shown:
            return ""
        more = " (more of these are not shown)" if self._said[alike] == self.shown else ""
        if bare in self._whole:
            text = shorten(text, self.short, placeholder=" ... (as above)")
        self._whole.add(bare)
        return f"warning: {under_way()}{text}{more}\n"


def explained(error: BaseException) -> tuple[str, int]:
    """One message on an error, and the exit status: 2 for bad input, 1 for the rest."""
    if isinstance(error, InputError):
        return str(error), 1 if isinstance(error, (RunBusyError, DamagedFileError)) else 2
    doing = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    for cause in _causes(error):
        if advice := memory_advice(f"{type(cause).__name__}: {cause}"):
            return f"{doing}out of memory: {advice}; {_AGAIN}", 1
        if isinstance(cause, OSError) and cause.errno is not None:
            return _system(cause), 1
    text = " ".join(str(error).split()) or "no message"
    return f"{doing}{type(error).__name__}: {text[:600]} (robustexplain --debug ... shows where)", 1


_AGAIN = "the same command then goes on from here"


def _system(error: OSError) -> str:
    if error.errno == errno.ENOENT and error.filename is None and not _has_folder():
        return "the folder that this was started in is gone; start it in one that exists"
    what = f"{error.filename or 'a file'}: {error.strerror}"
    if error.errno in FULL:
        return f"cannot write {what}; make room, and {_AGAIN}"
    if error.errno == errno.EROFS:
        return f"cannot write {what}; choose another --out"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no access to {what}; change its permissions, or choose another --out"
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return f"cannot write {what}; rename what is there, and {_AGAIN}"
    return what


def _has_folder() -> bool:
    """Whether the current folder exists."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
