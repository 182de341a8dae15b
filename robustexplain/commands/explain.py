"""``robustexplain explain``: one image, explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, MissingDataError
from .options import Size

if TYPE_CHECKING:
    from torch import Tensor

    from ..system import System


def explain(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    run: Annotated[Path | None, typer.Option(help="Explain with the systems of this run directory.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only these rows of the run. Repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Or with this classifier, such as efficientnet-lite0.")] = None,
    interpreter: Annotated[list[str] | None, typer.Option(help="Interpreters for --model. Repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("explained.png"),
    size: Size = None,
) -> None:
    """Explain one image: prediction, maps and alarms, as a picture."""
    for line in explain_image(image, run, row or [], model, interpreter or ["gradcam"], out, size):
        typer.echo(line)


def explain_image(
    image: Path,
    run: Path | None,
    rows: Sequence[str],
    model: str | None,
    interpreters: Sequence[str],
    out: Path,
    size: int | None = None,
) -> list[str]:
    """Explain an image with the systems of a run, or with a classifier and interpreters by name.

    Args:
        image: a file that PIL reads.
        run: a run directory; its systems explain.
        rows: only these rows of the run; default all.
        model: a classifier's name, instead of a run.
        interpreters: names, for ``model``.
        out: the picture to write.
        size: side to resize to; default what the systems were made for.

    Returns:
        A line a system: prediction, confidence, alarm.

    Raises:
        InputError: neither or both of ``run`` and ``model``; an unknown name; an unreadable image.
    """
    import numpy as np
    import torch

    from .. import files, plots

    if (run is None) == (model is None):
        raise InputError("explain needs either --run DIRECTORY or --model NAME")
    systems, side = systems_of_run(run, rows) if run is not None else systems_of_model(str(model), interpreters)
    first = next(iter(systems.values()))
    x = read_image(image, channels=channels_of(first), size=size or side)
    panels = [("image", x[0].permute(1, 2, 0).expand(-1, -1, 3).numpy())]
    lines = []
    for label, system in systems.items():
        with torch.no_grad():
            seen = system(x)
        p, c = seen.logits.softmax(1).max(1)
        alarm = "" if seen.alarm is None else f", score {float(seen.score):.2f}" + (" ALARM" if seen.alarm else "")  # type: ignore[arg-type]
        lines.append(f"{label}: class {int(c)}, {float(p):.1%}{alarm}")
        panels.append((f"{label}\nclass {int(c)}, {float(p):.0%}", plots.coloured(seen.maps[0], x[0])))
    files.replace_file(out, lambda aside: aside.write_bytes(plots.strip([(c, np.asarray(a)) for c, a in panels])))
    return [*lines, f"picture: {out}"]


def read_image(path: Path, channels: int = 3, size: int | None = None) -> Tensor:
    """An image file as ``[1, C, H, W]`` in ``[0, 1]``, squashed to ``size`` if one is given.

    Raises:
        MissingDataError: no such file.
        InputError: PIL cannot read it.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise MissingDataError(f"no image at {path}")
    try:
        picture = Image.open(path).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is not an image that can be read: {error}") from None
    array = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    x = array[None, None] if channels == 1 else array.permute(2, 0, 1)[None]
    if size is None or x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def systems_of_run(run: Path, rows: Sequence[str]) -> tuple[dict[str, System], int | None]:
    """Systems of a run by row label (default all rows), and the side of the images they were made for.

    Raises:
        InputError: a row that the run does not have; a run on a table, whose systems take no image.
    """
    from ..evaluation.results import Results
    from ..evaluation.store import RunFolder
    from ..system import System

    folder = RunFolder(run)
    folder.require()
    results = Results.read(folder)
    experiment, features = results.experiment, results.run.get("features", [])
    if features:
        raise InputError(
            f"the systems of {run} take rows of {len(features)} columns and no image; call them on rows yourself: "
            f"System.load({str(folder.system(experiment.rows[0].label))!r})"
        )
    labels = [row.label for row in experiment.rows]
    unknown = [row for row in rows if row not in labels]
    if unknown:
        raise InputError(f"{run} has no row {unknown[0]!r}; it has: {', '.join(labels)}")
    wanted = [label for label in labels if not rows or label in rows]
    for label in wanted:
        if why := folder.unsaved(label):
            raise InputError(f"the system of {label!r} is not in {run}: {why}")
    shape = results.run.get("shape") or results.recipe.data.load().shape
    return {label: System.load(folder.system(label)) for label in wanted}, int(shape[-1])


def systems_of_model(name: str, interpreters: Sequence[str]) -> tuple[dict[str, System], int | None]:
    """A classifier with each of the interpreters, by the interpreters' names, and the side it was made for.

    Raises:
        InputError: an interpreter that needs more than a model.
    """
    from .. import models
    from ..recipe.schema import needs_parts
    from ..registry import INTERPRETERS
    from ..system import System

    model = models.load(name)
    systems = {}
    for wanted in interpreters:
        entry = INTERPRETERS.get(wanted)
        if entry.train is not None or needs_parts(entry.build):
            raise InputError(f"{wanted!r} needs more than a model; train it in a recipe and use --run")
        systems[wanted] = System(model, entry.build(model))
    return systems, model.input_size


def channels_of(system: System) -> int:
    """How many channels the classifier takes; 3 where it does not say."""
    return int(getattr(system.model, "in_channels", 3))
