"""What is shown of a training: a note beside its bar, and a line at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from .selection import Selection
from .tracking import EpochRecord

EVERY = 0.25
"""Seconds between two notes: reading a loss waits for the device."""


class Notes:
    """Running loss and learning rate, read from the device a few times a second."""

    def __init__(self) -> None:
        self._next = 0.0

    def of(self, total: Tensor, count: int, lr: float, last: bool) -> str:
        """A note, or nothing where the last one is fresh.

        Args:
            total: of the epoch's losses so far, in this process.
            count: how many they are.
            lr: learning rate.
            last: whether the epoch ends here.
        """
        now = time.monotonic()
        if now < self._next and not last:
            return ""
        self._next = now + EVERY
        return f"loss {float(total) / count:.4g}, lr {lr:.2g}"


def closing_line(name: str, history: Sequence[EpochRecord], selection: Selection | None) -> str:
    """Name, epochs, last loss; the figures of the weights that are kept, and which epoch's they are."""
    words = [f"{len(history)} epoch{'s' * (len(history) != 1)}", f"loss {history[-1]['loss']:.4g}"]
    if selection is not None:
        words += [f"{figure} {value:.4g}" for figure, value in selection.history[selection.kept].items()]
        words.append(f"weights of epoch {selection.kept}" if selection.kept else "untrained weights kept")
    return f"{name}: {', '.join(words)}"
