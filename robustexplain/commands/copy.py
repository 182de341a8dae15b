"""``robustexplain copy``: a packaged recipe as a file to begin from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .. import recipes
from ..errors import InputError, UnknownNameError


def copy(
    recipe: Annotated[
        str, typer.Argument(help="A packaged recipe; see `robustexplain list recipes`.", autocompletion=recipes.names)
    ],
    dest: Annotated[Path | None, typer.Argument(help="The file to write; default the recipe's own name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Copy a packaged recipe to a file of your own, to begin from."""
    written = copy_recipe(recipe, dest or Path(), force=force)
    notes = recipes.notes(written)
    typer.echo(f"written: {written}")
    if "needs" in notes:
        typer.echo(f"needs: {' '.join(notes['needs'].split())}")
    typer.echo(f"next: robustexplain validate {shlex.quote(str(written))}")
    typer.echo(f"then: {_launch(notes.get('launch', ''), written)}")


def copy_recipe(name: str, dest: Path, *, force: bool = False) -> Path:
    """Copy a packaged recipe to a file, or into a directory under its own name.

    Args:
        name: as ``robustexplain list recipes`` shows it.
        dest: a file, or a directory that is there.
        force: replace a file that is there.

    Raises:
        UnknownNameError: with the nearest recipes.
        InputError: the file is there already, or its directory is not.
    """
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    if wanted not in recipes.names():
        raise UnknownNameError("recipe", name, recipes.names())
    file = dest / f"{Path(wanted).name}.yaml" if dest.is_dir() else dest
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"{file} cannot be written: {file.parent} is no directory")
    if file.exists() and not force:
        raise InputError(f"{file} is there already; --force replaces it")
    file.write_bytes(recipes.path(wanted).read_bytes())
    return file


def _launch(note: str, file: Path) -> str:
    # "robustexplain run quickstart --set ...": the third word names the recipe.
    command, verb, _, *options = (note or "robustexplain run RECIPE").splitlines()[0].split(" ", 3)
    return " ".join([command, verb, shlex.quote(str(file)), *options])
