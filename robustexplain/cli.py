"""The ``robustexplain`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError

app = typer.Typer(
    name="robustexplain",
    help="Attack explanations, defend them, and measure every defense against every attack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe such as quickstart.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a value: --set attacks[2].eps=4/255. Repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Another seed than the recipe's.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Judge at most so many images.")]


def main() -> None:
    """Run the command; bad input ends with one readable message and exit code 2, not with a traceback."""
    try:
        app()
    except InputError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


def _changes(changes: list[str] | None, seed: int | None, limit: int | None) -> list[str]:
    return [
        *(changes or []),
        *([f"seed={seed}"] if seed is not None else []),
        *([f"judge.images={limit}"] if limit is not None else []),
    ]


@app.command("run")
def run_command(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    changes: Set = None,
    limit: Limit = None,
    device: Annotated[str | None, typer.Option(help="cpu, or leave it to Accelerate.")] = None,
    seed: Seed = None,
) -> None:
    """Run a recipe, or go on with a run that was stopped: the same command again."""
    from .recipe import read

    checked = read(recipe, _changes(changes, seed, limit))
    session = _session(device)
    from .evaluation import run

    folder = out or Path("runs") / checked.name
    try:
        failed = run(checked, folder, session)
    except KeyboardInterrupt:
        typer.secho(f"stopped; what was finished is in {folder}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if session.accelerator.is_main_process:
        _show(folder)
    session.accelerator.end_training()
    if failed:
        typer.secho(f"{failed} cells failed; {folder / 'report.html'} shows which and why", fg="red", err=True)
        raise typer.Exit(1)


def _session(device: str | None) -> Any:
    from .progress import Bars, Silent
    from .training import Session, accelerator_for

    if device not in (None, "cpu", "cuda", "mps"):
        raise InputError(f"--device: expected cpu, cuda or mps, got {device!r}")
    accelerator = accelerator_for(cpu=device == "cpu")
    if device not in (None, accelerator.device.type):
        raise InputError(f"--device {device}: this process has {accelerator.device.type}; check `accelerate env`")
    return Session(accelerator, progress=Bars() if accelerator.is_main_process else Silent())


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html and matrix.csv of a run again, from its cells."""
    from .evaluation import RunFolder, write_report

    run_folder = RunFolder(folder)
    run_folder.require()
    write_report(run_folder)
    _show(folder)


@app.command("sanity")
def sanity_command(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME, as for run.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="cascading, independent, labels, shift. Repeatable.")] = None,
    changes: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Explain at most so many images.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or leave it to Accelerate.")] = None,
    seed: Seed = None,
) -> None:
    """Check whether a recipe's interpreters depend on the model: weights and labels at random, inputs shifted."""
    from .recipe import read
    from .sanity.run import run_sanity

    checked = read(recipe, [*_changes(changes, seed, None), *([f"sanity.images={limit}"] if limit else [])])
    session = _session(device)
    folder = out or Path("runs") / checked.name
    failed = run_sanity(checked, folder, session, check or [])
    if session.accelerator.is_main_process:
        typer.echo(f"sanity checks: {folder / 'sanity.html'}")
    session.accelerator.end_training()
    if failed:
        typer.secho(f"{failed} checks failed; {folder / 'sanity.html'} shows which and why", fg="red", err=True)
        raise typer.Exit(1)


@app.command("validate")
def validate_command(
    recipe: Recipe,
    changes: Set = None,
    data: Annotated[bool, typer.Option(help="Also look whether data and weights are there.")] = True,
) -> None:
    """Check a recipe without running it."""
    from .recipe import check_data, read

    checked = read(recipe, changes or [])
    if data:
        check_data(checked)
    cells = len(checked.rows) * len(checked.columns)
    typer.echo(f"{checked.name}: {len(checked.rows)} rows x {len(checked.columns)} columns = {cells} cells; all well")


@app.command("list")
def list_command(
    kind: Annotated[str, typer.Argument(help="attacks, defenses, interpreters, metrics, models, datasets, ...")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """List what there is of a kind: name, paper, needs and defaults, read off the classes."""
    from .commands.list import markdown, print_table

    if as_markdown:
        typer.echo(markdown(kind))
    else:
        print_table(kind)


@app.command("explain")
def explain_command(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    run: Annotated[Path | None, typer.Option(help="Explain with the systems of this run directory.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only these rows of the run. Repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Or with this classifier, such as efficientnet-lite0.")] = None,
    interpreter: Annotated[list[str] | None, typer.Option(help="Interpreters for --model. Repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("explained.png"),
    size: Annotated[int | None, typer.Option(min=1, help="Side to resize to; default the model's own.")] = None,
) -> None:
    """Explain one image: prediction, maps and alarms, as a picture."""
    from .commands.explain import explain_image

    for line in explain_image(image, run, row or [], model, interpreter or ["gradcam"], out, size):
        typer.echo(line)


@app.command("attack")
def attack_command(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    attack: Annotated[str, typer.Option(help="The attack; see `robustexplain list attacks`.")] = "adv2",
    interpreter: Annotated[str, typer.Option(help="Whose maps are attacked and shown, for --model.")] = "gradcam",
    model: Annotated[str | None, typer.Option(help="The classifier, such as efficientnet-lite0.")] = None,
    run: Annotated[Path | None, typer.Option(help="Or attack a system of this run directory.")] = None,
    row: Annotated[str | None, typer.Option(help="Which row of the run; default the first.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="A setting: eps=8/255. Repeatable.")] = None,
    goal_class: Annotated[int | None, typer.Option(min=0, help="What should be predicted; default random.")] = None,
    untargeted: Annotated[bool, typer.Option(help="Any other class will do.")] = False,
    goal_map: Annotated[str, typer.Option(help="benign, or random-patch.")] = "benign",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("attacked"),
    size: Annotated[int | None, typer.Option(min=1, help="Side to resize to; default the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random class and patch.")] = 0,
) -> None:
    """Attack one image: the attacked image, the maps before and after, and the numbers."""
    from .commands.attack import Wish, attack_image

    wish = Wish(goal_class, untargeted, goal_map, seed)
    for line in attack_image(
        image, attack, changes or [], out, run=run, row=row, model=model, interpreter=interpreter, wish=wish, size=size
    ):
        typer.echo(line)


@app.command("gallery")
def gallery_command(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("gallery.html"),
    image: Annotated[list[Path] | None, typer.Option(help="A photograph to explain. Repeatable.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images a section.")] = 4,
    size: Annotated[int, typer.Option(min=32, help="Side of the photographs; 224 takes many minutes.")] = 128,
    device: Annotated[str | None, typer.Option(help="cpu, or leave it to Accelerate.")] = None,
) -> None:
    """Show every interpreter on the same images: digits, and photographs where ImageNet weights are installed."""
    from .commands.gallery_page import write_gallery

    for section in write_gallery(out, image or [], _session(device), count, size):
        shown = sum(bool(line.maps) for line in section.lines)
        typer.echo(f"{section.title}: {shown} of {len(section.lines)} interpreters")
    typer.echo(f"gallery: {out}")


def _show(folder: Path) -> None:
    from .evaluation.report import print_matrix

    print_matrix(folder)
    typer.echo(f"report: {folder / 'report.html'}")
