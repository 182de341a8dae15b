"""``robustexplain report``: a run's report again, from its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html and matrix.csv of a run again, from its cells."""
    from ..evaluation import RunFolder, write_report

    run_folder = RunFolder(folder)
    run_folder.require()
    write_report(run_folder)
    show(folder)


def show(folder: Path) -> None:
    """Print a run's matrix, and where its report is."""
    from ..evaluation.report import print_matrix

    print_matrix(folder)
    typer.echo(f"report: {folder / 'report.html'}")
