"""``robustexplain diff``: what changed between two runs, beyond chance."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..evaluation.comparing import Change, Comparison

HEAD = ("row", "column", "before", "after", "difference", "low", "high", "p", "paired", "in doubt", "made otherwise")


def diff(
    before: Annotated[Path, typer.Argument(help="A run directory.")],
    after: Annotated[Path, typer.Argument(help="Another one, of rows and columns of the same labels.")],
    measure: Annotated[str | None, typer.Option(help="l1, success, ...; default the report's main measure.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also what did not change beyond chance.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write every comparison here, as CSV.")] = None,
) -> None:
    """Compare two runs cell by cell, on the same inputs where they are the same; p-values are corrected (Holm)."""
    from .. import files
    from ..evaluation import RunFolder
    from ..evaluation.comparing import Side, compare

    first, second = RunFolder(before), RunFolder(after)
    first.require()
    second.require()
    found = compare(Side.read(first), Side.read(second), measure)
    _print(found, every)
    if out is not None:
        files.write_text(out, table(found))
        typer.echo(f"every comparison: {out}")


def table(found: Comparison) -> str:
    """Every comparison as CSV."""
    from .. import files

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEAD)
    for c in found.changes:
        numbers = (c.before, c.after, c.found.value, c.found.low, c.found.high, c.p)
        words = ("yes" if c.paired else "no", "yes" if c.doubted else "no", " and ".join(c.remade))
        labels = map(files.as_text, (c.row, c.column))
        writer.writerow([*labels, *("" if n is None else f"{n:.9g}" for n in numbers), *words])
    return buffer.getvalue()


def _print(found: Comparison, every: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    changed = [c for c in found.changes if c.beyond_chance]
    said = [f"{len(changed)} of {len(found.changes)} figures changed beyond chance"]
    apart = sum(not c.paired for c in found.changes)
    said.append(f"{apart} are of different inputs" if apart else "all of them are compared on the same inputs")
    tests = f"95% intervals; p corrected for {len(found.changes)} comparisons by Holm's procedure"
    typer.echo(f"{found.title}: {'; '.join(said)} ({tests})")
    seeds = min(c.seeds for c in found.changes)
    typer.echo(
        f"over {seeds} trainings of each run"
        if seeds > 1
        else "one training of each run: another one might give other figures (`seeds` of a recipe trains again)"
    )
    if not every and len(changed) < len(found.changes):
        typer.echo("`--all` lists what did not change beyond chance, too")
    shown = Table()
    for head in ("row", "column", "before", "after", "difference", "p", ""):
        shown.add_column(head, justify="left" if head in ("row", "column", "") else "right")
    for c in found.changes if every else changed:
        shown.add_row(c.row, c.column, f"{c.before:.3f}", f"{c.after:.3f}", *_written(c))
    console = Console(markup=False, emoji=False)
    if shown.row_count:
        (console if console.is_terminal else Console(width=150, markup=False, emoji=False)).print(shown)
    for what, labels in found.alone.items():
        typer.echo(f"{what}: {', '.join(labels)}")
    for name, a, b in found.settings:
        typer.echo(f"differs: {name}: {a!r} -> {b!r}")


def _written(c: Change) -> tuple[str, str, str]:
    words = [*(["in doubt"] if c.doubted else []), *(f"{part} made otherwise" for part in c.remade)]
    if not c.paired:
        words.append("other inputs")
    if c.found.value is None:
        return "-", "-", ", ".join(words)
    gap = f"{c.found.value:+.3f} [{c.found.low:+.2f}, {c.found.high:+.2f}]"
    return gap, "-" if c.p is None else f"{c.p:.2g}", ", ".join(words)
