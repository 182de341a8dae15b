"""``robustexplain report``: a run's report again, from its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError


def report(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write it; default the run directory, which may be read-only.")
    ] = None,
) -> None:
    """Write a run's report.html, tables and figures again, from its cells; damaged files are named and left out."""
    from ..evaluation import RunFolder, write_report

    run_folder = RunFolder(folder)
    run_folder.require()
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; the name of a folder is needed")
    written = write_report(run_folder, out)
    if show(folder, written):
        raise typer.Exit(1)


def show(folder: Path, written: Path | None = None) -> bool:
    """Print a run's matrix, and where its report is; whether files of it are damaged, which are named."""
    from ..evaluation import Results, RunFolder
    from ..evaluation.doubts import doubts
    from ..evaluation.ranking import arrays_of, ranking
    from ..evaluation.report import print_matrix

    results = Results.read(RunFolder(folder))
    found = doubts(results)
    print_matrix(results, ranking(results, arrays_of(results, RunFolder(folder)), found), found)
    typer.echo(f"report: {written or folder / 'report.html'}")
    for why in results.damaged:
        typer.secho(f"left out: {why}; `robustexplain run` makes it anew", fg="red", err=True)
    return bool(results.damaged)
