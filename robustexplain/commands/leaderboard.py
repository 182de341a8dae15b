"""``robustexplain leaderboard``: the rows of several runs on one page, worst case first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def leaderboard(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("leaderboard.html"),
) -> None:
    """Rank the rows of several runs by their worst case, among those that were measured in the same way."""
    from ..evaluation import RunFolder
    from ..evaluation.leaderboard import write_leaderboard

    folders = [RunFolder(path) for path in dict.fromkeys(runs)]
    for folder in folders:
        folder.require()
    typer.echo(f"leaderboard: {write_leaderboard(folders, out)}")
