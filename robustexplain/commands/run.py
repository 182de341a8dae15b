"""``robustexplain run``: the matrix of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Changes, Device, Limit, Recipe, Seed, Track, TrustCode, changes_of, session_of
from .report import show


def run(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    changes: Changes = None,
    limit: Limit = None,
    device: Device = None,
    seed: Seed = None,
    trust_code: TrustCode = False,
    track: Track = None,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(help="Another run directory: trainings that are the same there are copied from it. Repeatable."),
    ] = None,
) -> None:
    """Run a recipe, or go on with a run that was stopped: the same command again."""
    from .. import evaluation
    from ..recipe import read

    checked = read(recipe, changes_of(changes, seed, limit), trust_code=trust_code)
    session = session_of(device, track, reuse)
    folder = out or Path("runs") / checked.name
    try:
        failed = evaluation.run(checked, folder, session)
    except KeyboardInterrupt:
        typer.secho(f"stopped; what was finished is in {folder}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if session.accelerator.is_main_process:
        show(folder)
    session.accelerator.end_training()
    if failed:
        typer.secho(f"{failed} cells failed; {folder / 'report.html'} shows which and why", fg="red", err=True)
        raise typer.Exit(1)
