"""``robustexplain validate``: a recipe's mistakes, before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Changes, Limit, Recipe, Seed, TrustCode, changes_of


def validate(
    recipe: Recipe,
    changes: Changes = None,
    limit: Limit = None,
    seed: Seed = None,
    data: Annotated[bool, typer.Option(help="Also look whether data and weights are there.")] = True,
    trust_code: TrustCode = False,
) -> None:
    """Check a recipe without running it; takes the options of run that change a recipe."""
    from ..recipe import check_data, read, short_of_reach

    checked = read(recipe, changes_of(changes, seed, limit), trust_code=trust_code)
    if data:
        check_data(checked)
    for note in short_of_reach(checked):
        typer.secho(f"warning: {note}", fg="yellow", err=True)
    cells = len(checked.rows) * len(checked.columns)
    typer.echo(f"{checked.name}: {len(checked.rows)} rows x {len(checked.columns)} columns = {cells} cells; all well")
