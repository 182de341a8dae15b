"""``robustexplain sanity``: do a recipe's explanations depend on the model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Changes, Device, Recipe, Seed, Track, TrustCode, changes_of, session_of


def sanity(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME, as for run.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="cascading, independent, labels, shift. Repeatable.")] = None,
    changes: Changes = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Explain at most so many images.")] = None,
    device: Device = None,
    seed: Seed = None,
    trust_code: TrustCode = False,
    track: Track = None,
) -> None:
    """Check whether a recipe's interpreters depend on the model: weights and labels at random, inputs shifted."""
    from ..recipe import read
    from ..sanity.run import run_sanity

    limited = [f"sanity.images={limit}"] if limit else []
    checked = read(recipe, [*changes_of(changes, seed, None), *limited], trust_code=trust_code)
    session = session_of(device, track)
    folder = out or Path("runs") / checked.name
    failed = run_sanity(checked, folder, session, check or [])
    if session.accelerator.is_main_process:
        typer.echo(f"sanity checks: {folder / 'sanity.html'}")
    session.accelerator.end_training()
    if failed:
        typer.secho(f"{failed} checks failed; {folder / 'sanity.html'} shows which and why", fg="red", err=True)
        raise typer.Exit(1)
