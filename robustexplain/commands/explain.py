"""``robustexplain explain``: one image, explained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, RobustExplainWarning, doing
from .options import Size, TrustCode

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..evaluation.store import RunFolder
    from ..interpreters import Certificate
    from ..system import System


def explain(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    run: Annotated[Path | None, typer.Option(help="Explain with the systems of this run directory.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only these rows of the run. Repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Or with this classifier, such as efficientnet-lite0.")] = None,
    interpreter: Annotated[list[str] | None, typer.Option(help="Interpreters for --model. Repeatable.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A file with the weights of --model.")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("explained.png"),
    size: Size = None,
    trust_code: TrustCode = False,
) -> None:
    """Explain one image: prediction, maps and alarms, as a picture."""
    refuse_others(run, {"--interpreter": interpreter, "--weights": weights}, {"--row": row})
    kinds = interpreter or ["gradcam"]
    for line in explain_image(image, run, row or [], model, kinds, out, size, trust_code, weights):
        typer.echo(line)


def refuse_others(run: Path | None, of_model: Mapping[str, object], of_run: Mapping[str, object]) -> None:
    """Refuse options that the other of ``--run`` and ``--model`` has.

    Raises:
        InputError: naming the option.
    """
    other, mine = ("--model", of_model) if run is not None else ("--run", of_run)
    for name, value in mine.items():
        if value is not None:
            raise InputError(f"{name} goes with {other}, and {'--run' if run is not None else '--model'} was given")


def explain_image(
    image: Path,
    run: Path | None,
    rows: Sequence[str],
    model: str | None,
    interpreters: Sequence[str],
    out: Path,
    size: int | None = None,
    trust_code: bool = False,
    weights: Path | None = None,
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
        trust_code: whether code of the user's own that the run's recipe names may run.
        weights: a file with the weights of ``model``.

    Returns:
        A line a system: prediction, confidence, alarm; another where something is certified of the map.

    Raises:
        InputError: neither or both of ``run`` and ``model``; an unknown name; an unreadable image; ``out`` is a folder.
    """
    import numpy as np
    import torch

    from .. import files, plots

    if (run is None) == (model is None):
        raise InputError("explain needs either --run DIRECTORY or --model NAME")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; the name of a picture is needed, such as {out / 'explained.png'}")
    systems, side = (
        systems_of_run(run, rows, trust_code)
        if run is not None
        else systems_of_model(str(model), interpreters, weights)
    )
    first = next(iter(systems.values()))
    x = image_of(first, image, size or side)
    warn_of_random_weights(model, weights)
    panels = [("image", x[0].permute(1, 2, 0).expand(-1, -1, 3).numpy())]
    lines = []
    for label, system in systems.items():
        with torch.no_grad():
            seen = system(x)
        p, c = seen.logits.softmax(1).max(1)
        alarm = "" if seen.alarm is None else f", score {float(seen.score):.2f}" + (" ALARM" if seen.alarm else "")  # type: ignore[arg-type]
        lines.append(f"{label}: class {int(c)}, {float(p):.1%}{alarm}")
        panels.append((f"{label}\nclass {int(c)}, {float(p):.0%}", plots.coloured(seen.maps[0], x[0])))
        if seen.certificate is not None:
            lines.append(f"{label}: {certified_in_words(seen.certificate)}")
            if seen.certificate.decided is not None:
                panels.append((caption_of(seen.certificate), plots.three_colours(seen.certificate.decided[0])))
    files.replace_file(out, lambda aside: aside.write_bytes(plots.strip([(c, np.asarray(a)) for c, a in panels])))
    return [*lines, f"picture: {out}"]


def caption_of(certificate: Certificate) -> str:
    """What the three colours of a certificate's picture mean."""
    if not certificate.radius:
        return "significantly important,\nunimportant, neither (this input)"
    return f"certified important,\nunimportant, neither (L2 {certificate.radius:.2g})"


def certified_in_words(certificate: Certificate) -> str:
    """What is certified of the first map of a batch."""
    shares = {name.removeprefix("certified_"): float(value[0]) for name, value in certificate.shares().items()}
    radius = shares.pop("radius")
    within = f"within L2 {radius:.3g}" if radius else "under the noise, at this very input"
    within += " and for this prediction" if radius and certificate.same_class else ""
    words = {"one": "of the map is certified as important", "zero": "as unimportant", "overlap": "of its top stays"}
    return f"{', '.join(f'{value:.1%} {words[n]}' for n, value in shares.items())} at least, {within}"


def image_of(system: System, path: Path, size: int | None) -> Tensor:
    """An image file as the system takes it, ``[1, C, H, W]``; resized to ``size`` if its inputs are not specified.

    Raises:
        MissingDataError: no such file.
        InputError: PIL cannot read it; another size than the system takes.
    """
    if system.inputs is not None:
        if size is not None and system.inputs.size not in (None, (size, size)):
            raise InputError(f"--size {size}: the system takes images of {system.inputs.size}")
        return system.prepare(path)
    return read_image(path, channels_of(system), size)


def read_image(path: Path, channels: int = 3, size: int | None = None) -> Tensor:
    """An image file as ``[1, C, H, W]`` in ``[0, 1]``, squashed to ``size`` if one is given.

    Raises:
        MissingDataError: no such file.
        InputError: PIL cannot read it.
    """
    from ..data import decoded

    return decoded(path, None if size is None else (size, size), "squash", channels)[None]


def systems_of_run(run: Path, rows: Sequence[str], trust_code: bool = False) -> tuple[dict[str, System], int | None]:
    """Systems of a run by row label (default all rows), and the side of the images they were made for.

    ``trust_code``: whether code of the user's own that the run's recipe names may run; without it, it is refused.

    Raises:
        InputError: a row that the run does not have; a run on a table, whose systems take no image.
    """
    from ..evaluation.results import Results
    from ..evaluation.store import RunFolder
    from ..recipe.experiment import Recipe

    folder = RunFolder(run)
    folder.require()
    results = Results.read(folder)
    features = results.run.get("features", [])
    experiment = results.experiment
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
    recipe = experiment if isinstance(experiment, Recipe) else None
    if recipe is not None and recipe.model.file is not None:
        # A module for each system: its weights are read into it.
        recipe = recipe.trusting() if trust_code else recipe
        data, bare = recipe.data.load(), replace(recipe.model, weights=None)
        own = {label: bare.load(data.shape, data.num_classes, 0) for label in wanted}
        systems = {n: _loaded(folder, n, module) for n, module in own.items()}
    else:
        systems = {label: _loaded(folder, label) for label in wanted}
    # If no system specifies its inputs, the run does, and at last its data, which may be on another machine.
    if all(system.inputs is not None for system in systems.values()):
        return systems, None
    shape = results.run.get("shape") or results.recipe.data.load().shape
    return systems, int(shape[-1])


def _loaded(folder: RunFolder, label: str, model: nn.Module | None = None) -> System:
    """A system of a run, which must be the one that the run saved."""
    from ..system import System

    path, expected = folder.system(label), folder.system_sum(label)
    with doing(f"loading the system of {label!r}"):
        if model is not None:
            return System.load(path, model=model, weights="stored", sha256=expected)
        return System.load(path, sha256=expected)


def systems_of_model(
    name: str, interpreters: Sequence[str], weights: Path | None = None
) -> tuple[dict[str, System], int | None]:
    """A classifier with each of the interpreters, by the interpreters' names, and the side it was made for.

    Raises:
        InputError: an interpreter that needs more than a model.
    """
    from .. import models
    from ..interpreters import InterpreterSpec
    from ..system import System

    model = models.load(name, weights=weights)
    systems = {}
    for wanted in map(InterpreterSpec, interpreters):
        if wanted.refusal is not None:
            raise InputError(f"{wanted.refusal}; train it in a recipe and use --run")
        systems[wanted.name] = System(model, wanted.build(model))
    return systems, model.input_size


def warn_of_random_weights(name: str | None, weights: Path | None) -> None:
    """Warn where nothing was loaded: predictions and maps of random weights say nothing."""
    from .. import models

    if name is not None and weights is None and models.has_random_weights(name):
        warnings.warn(
            f"{name} has random weights: what it predicts and what explains it says nothing; give a file with "
            "--weights, or train it in a recipe and use --run",
            RobustExplainWarning,
            stacklevel=2,
        )


def channels_of(system: System) -> int:
    """How many channels the classifier takes; 3 if unknown."""
    return int(getattr(system.model, "in_channels", 3))
