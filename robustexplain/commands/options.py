"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import recipes
from ..errors import InputError

if TYPE_CHECKING:
    from ..training import Session

Recipe = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a packaged recipe such as quickstart; see `robustexplain list recipes`.",
        autocompletion=recipes.names,
    ),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: --set attacks[2].eps=4/255. Repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Another seed than the recipe's.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Judge at most so many images.")]
Device = Annotated[str | None, typer.Option(help="cpu, or leave it to Accelerate.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Let the Python files that the recipe names (model.file, data.file) run.")
]
Track = Annotated[
    list[str] | None, typer.Option("--track", help="Tell each training's epochs to tensorboard, wandb, ... Repeatable.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Side to resize to; default the model's own.")]


def changes_of(changes: list[str] | None, seed: int | None, limit: int | None) -> list[str]:
    """``--set``, ``--seed`` and ``--limit`` as changes of a recipe."""
    return [
        *(changes or []),
        *([f"seed={seed}"] if seed is not None else []),
        *([f"evaluation.images={limit}"] if limit is not None else []),
    ]


def session_of(device: str | None, track: list[str] | None = None, reuse: list[Path] | None = None) -> Session:
    """A session on that device, with progress bars on the main process, trackers, and runs to take trainings from.

    Raises:
        InputError: a device that there is not, a tracker that cannot work, a run that is not there.
    """
    from ..progress import Bars, Silent
    from ..training import Session, accelerator_for

    if device not in (None, "cpu", "cuda", "mps"):
        raise InputError(f"--device: expected cpu, cuda or mps, got {device!r}")
    accelerator = accelerator_for(cpu=device == "cpu")
    if device not in (None, accelerator.device.type):
        raise InputError(f"--device {device}: this process has {accelerator.device.type}; check `accelerate env`")
    progress = Bars() if accelerator.is_main_process else Silent()
    return Session(accelerator, progress=progress, trackers=tuple(track or ()), reuse=tuple(reuse or ()))
