"""``robustexplain scan``: does a scanner tell manipulated models from honest ones?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Changes, Device, Recipe, Seed, Track, TrustCode, changes_of, session_of

if TYPE_CHECKING:
    from ..evaluation.statistics import Estimate


def scan(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME, as for run.")] = None,
    changes: Changes = None,
    models: Annotated[int | None, typer.Option(min=1, help="Train and manipulate so many models.")] = None,
    device: Device = None,
    seed: Seed = None,
    trust_code: TrustCode = False,
    track: Track = None,
) -> None:
    """Scan a recipe's honest, manipulated and repaired models, trained anew from several seeds: AUC over models."""
    from ..evaluation.scan_page import PAGE
    from ..evaluation.scan_results import read_results
    from ..evaluation.scanning import run_scans
    from ..evaluation.store import RunFolder
    from ..recipe import read

    several = [f"scan.models={models}"] if models else []
    checked = read(recipe, [*changes_of(changes, seed, None), *several], trust_code=trust_code)
    session = session_of(device, track)
    folder = out or Path("runs") / checked.name
    failed = run_scans(checked, folder, session)
    if session.accelerator.is_main_process:
        for found in read_results(checked, RunFolder(folder)):
            area = "honest" if found.auc is None else f"AUC {_interval(found.auc)}"
            against = found.against_controls
            beside = "" if against is None else f", {_interval(against)} against controls"
            typer.echo(
                f"{found.row}: {found.scanner}: {area}{beside}, {found.detected:.0%} of {found.models} detected, "
                f"agreement with the honest maps {found.agreement:.2f}"
            )
        typer.echo(f"scans: {folder / PAGE}")
    session.accelerator.end_training()
    if failed:
        typer.secho(f"{failed} scans failed; the files in {folder / 'scans'} say why", fg="red", err=True)
        raise typer.Exit(1)


def _interval(area: Estimate) -> str:
    return f"{area.value:.2f} ({area.low:.2f}-{area.high:.2f})"
