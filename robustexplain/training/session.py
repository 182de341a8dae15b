"""Where and on what training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from ..progress import Progress, Silent
from .precision import check_precision
from .reuse import Shelf
from .tracking import check_trackers


def accelerator_for(*, cpu: bool = False) -> Accelerator:
    """An accelerator whose processes wait for one another for up to a day.

    Processes share out chunks of images, and an attack on one chunk can take hours; torch gives up on a process that
    is not there after 10 minutes (NCCL) or 30 (Gloo). One that has died is noticed at once, by its launcher.

    Args:
        cpu: stay on the CPU, whatever the machine has.

    Raises:
        InputError: float16 on a CPU.
    """
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    check_precision(accelerator)
    return accelerator


@dataclass
class Session:
    """Where and on what training runs: the accelerator, the folder of checkpoints, the progress display, trackers.

    Args:
        accelerator: Accelerate's. One of your own must wait for others as long as the longest chunk takes: see
            :func:`accelerator_for`.
        folder: where checkpoints go, and beside each a ``NAME.history.json``; ``None`` keeps nothing.
        progress: what is shown while it runs.
        trackers: names of Accelerate's trackers, such as ``tensorboard``, that are told each epoch's loss, learning
            rate and figures.
        reuse: folders of earlier trainings; one that is the same (name, settings, seed, identity, precision) is copied
            into ``folder`` instead of made again. A training without an identity is never taken from elsewhere.
        shelf: what was found in ``reuse``; made when it is first looked at.

    Raises:
        InputError: an unknown tracker, or one whose package is not installed; a folder to reuse that is not there.
    """

    accelerator: Accelerator = field(default_factory=accelerator_for)
    folder: Path | None = None
    progress: Progress = field(default_factory=Silent)
    trackers: tuple[str, ...] = ()
    reuse: tuple[Path, ...] = ()
    shelf: Shelf | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_trackers(self.trackers)
        self.reuse = tuple(Path(folder) for folder in self.reuse)
        # A session derived from this one has the same shelf: it is searched once.
        if self.reuse and (self.shelf is None or self.shelf.folders != self.reuse):
            self.shelf = Shelf(self.reuse)

    def inside(self, name: str) -> Session:
        """The same with the checkpoints in a folder of that name."""
        return replace(self, folder=None if self.folder is None else self.folder / name)

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        device: torch.device = self.accelerator.device
        return device
