"""Progress bars with the time left, on the main process only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """What a piece of work calls as it goes."""

    def __call__(self, steps: int, /, *, note: str = "") -> None:
        """So many steps are done; ``note`` is shown beside the bar until there is another one."""
        ...


class Progress(Protocol):
    """Shows how far a piece of work is."""

    def task(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """A piece of work of ``total`` steps; the block gets a function to call with the steps just done."""
        ...

    def say(self, text: str) -> None:
        """A line of text above the bars."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show nothing."""
        yield _nothing

    def say(self, text: str) -> None:
        """Say nothing."""


def _nothing(steps: int, /, *, note: str = "") -> None:
    pass


class Labelled:
    """Another progress display, every task of which begins with a label.

    Args:
        inner: what shows them.
        label: whose work it is.
    """

    def __init__(self, inner: Progress, label: str) -> None:
        self.inner, self.label = inner, label

    def task(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """The task, under the label."""
        return self.inner.task(f"{self.label}: {name}", total, done)

    def say(self, text: str) -> None:
        """The line, under the label."""
        self.inner.say(f"{self.label}: {text}")


class Bars:
    """rich's bars: name, note, bar, count, time taken, time left. Without a terminal, a line for each finished task."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, markup=False, emoji=False)

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """One bar for the length of the block."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        columns = (
            TextColumn("{task.description:<38}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Rich(*columns, console=self.console) as bars:
            handle = bars.add_task(name, total=total, completed=done)

            def advance(steps: int, /, *, note: str = "") -> None:
                if note:  # otherwise the last one stays; a column of its own leaves no room in 80 characters
                    bars.update(handle, description=f"{name}  {note}")
                bars.advance(handle, steps)

            yield advance

    def say(self, text: str) -> None:
        """Print a line on standard error."""
        self.console.print(text, highlight=False)
