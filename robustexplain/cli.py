"""The ``robustexplain`` command: its verbs are in ``commands``, one file each."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from . import __version__
from .commands.attack import attack
from .commands.copy import copy
from .commands.diff import diff
from .commands.explain import explain
from .commands.failure import DEBUG, WarningLines, explained, wants_traceback
from .commands.gallery import gallery
from .commands.leaderboard import leaderboard
from .commands.list import list_kind
from .commands.report import report
from .commands.run import run
from .commands.sanity import sanity
from .commands.scan import scan
from .commands.validate import validate
from .errors import RobustExplainWarning

INTERRUPTED = 130

app = typer.Typer(
    name="robustexplain",
    help="Attack explanations, defend them, and measure every defense against every attack.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
VERBS: dict[str, Callable[..., None]] = {
    "run": run,
    "report": report,
    "diff": diff,
    "leaderboard": leaderboard,
    "sanity": sanity,
    "scan": scan,
    "validate": validate,
    "list": list_kind,
    "copy": copy,
    "explain": explain,
    "attack": attack,
    "gallery": gallery,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robustexplain {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error; {DEBUG}=1 does so too.")
    ] = False,
) -> None:
    # Options of the command itself; its help is that of `app`.
    if debug:
        os.environ[DEBUG] = "1"


def main() -> None:
    """Run the command; an error ends with one message: exit code 2 for bad input, 1 for the rest.

    The traceback is shown before it on request alone: ``robustexplain --debug VERB ...``.
    """
    with _second_interrupt_leaves(), _warnings_in_one_line():
        try:
            app()
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Exception as error:
            if wants_traceback():
                traceback.print_exc()
            message, status = explained(error)
            typer.secho(f"error: {message}", fg="red", err=True)
            sys.exit(status)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    usual, lines = warnings.formatwarning, WarningLines()
    # Whoever asks for tracebacks is shown the places of warnings too.
    warnings.formatwarning = lambda *words: usual(*words) if wants_traceback() else lines(*words)
    try:
        with warnings.catch_warnings():
            # What one row says is not silent because another said the same; what the user filters goes first.
            warnings.simplefilter("always", RobustExplainWarning, append=True)
            yield
    finally:
        warnings.formatwarning = usual


@contextmanager
def _second_interrupt_leaves() -> Iterator[None]:
    """The first Ctrl-C raises ``KeyboardInterrupt`` as usual, the next one ends the process with exit code 130.

    One that arrives while the first is being handled, or while Python shuts down, would end it with a traceback or by
    the signal itself. Files are never half-written, so leaving at once loses nothing.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        # Towards its end Python gives signals back to the system, which would kill: the little that is left is let be.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, usual)
