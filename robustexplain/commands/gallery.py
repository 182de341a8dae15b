"""``robustexplain gallery``: every interpreter on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, session_of


def gallery(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("gallery.html"),
    image: Annotated[list[Path] | None, typer.Option(help="A photograph to explain. Repeatable.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images a section.")] = 4,
    size: Annotated[int, typer.Option(min=32, help="Side of the photographs; 224 takes many minutes.")] = 128,
    device: Device = None,
) -> None:
    """Show every interpreter on the same images: digits, and photographs where ImageNet weights are installed."""
    from .gallery_page import write_gallery

    for section in write_gallery(out, image or [], session_of(device), count, size):
        shown = sum(bool(line.maps) for line in section.lines)
        typer.echo(f"{section.title}: {shown} of {len(section.lines)} interpreters")
    typer.echo(f"gallery: {out}")
