"""The ``robustexplain`` command: its verbs are in ``commands``, one file each."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from . import __version__
from .commands.attack import attack
from .commands.copy import copy
from .commands.explain import explain
from .commands.gallery import gallery
from .commands.list import list_kind
from .commands.report import report
from .commands.run import run
from .commands.sanity import sanity
from .commands.validate import validate
from .errors import InputError

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
    "sanity": sanity,
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
) -> None:
    # Options of the command itself; its help is that of `app`.
    pass


def main() -> None:
    """Run the command; bad input ends with one readable message and exit code 2, not with a traceback."""
    with _second_interrupt_leaves():
        try:
            app()
        except InputError as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


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
