"""Checks before any training: the recipe against its data, its model and the installed packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data as data_sets
from .. import models
from ..autograd.layers import submodule
from ..autograd.rectifiers import require_rectifiers
from ..checks import Kind
from ..data.base import Digest
from ..errors import InputError, UnsupportedModelError, memory_advice
from ..interpreters import AttentionRollout, Gradient, InterpreterSpec, Theta
from ..interpreters.base import accepted_kinds
from ..interpreters.cam.token_grid import Attentions
from ..models.senn import explains_itself
from ..models.weights import load_file_into
from ..registry import DEFENSES, INTERPRETERS
from .experiment import Recipe, Row
from .problems import Problems
from .rows import interpreter_of, standing_on


def check_data(recipe: Recipe) -> data_sets.Data:
    """Load the data set and check it against the recipe, before any training.

    Raises:
        MissingDataError: files that are not there.
        InputError: a needed part that is empty, a missing layer or package; with every problem found.
    """
    problems = Problems()
    weights = recipe.model.weights
    there = weights is None or Path(weights).expanduser().is_file()
    if not there:
        problems.missing.append(f"model.weights: no file at {weights}")
    loaded: data_sets.Data | None = problems.run(lambda: _loaded(recipe), "data")
    for label, component in _installable(recipe):
        problems.run(component.ready, label)
    if loaded is not None:
        named = problems.run(lambda: recipe.named(loaded.features))
        model = problems.run(lambda: _model(named, loaded), "model") if there and named is not None else None
        for finding in FINDINGS:
            for line in finding(Situation(recipe, loaded, model)):
                problems.add(line)
    problems.stop()
    assert loaded is not None  # a problem otherwise; for the type checker
    return loaded


def _loaded(recipe: Recipe) -> data_sets.Data:
    """The data set.

    Raises:
        InputError: also where a library refuses it, such as for want of memory.
    """
    try:
        loaded: data_sets.Data = recipe.data.load()
    except (RuntimeError, MemoryError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        advice = "; take fewer or smaller inputs" if memory_advice(why) else ""
        raise InputError(f"cannot be made: {why}{advice}") from error
    return loaded if loaded.digest else replace(loaded, digest=_looked_at(loaded))


LOOKED_AT = 256
"""Inputs of each part that a data set without a digest of its own is told by."""


def _looked_at(data: data_sets.Data) -> str:
    """A digest of all labels and of some inputs of each part, evenly spread."""
    digest = Digest(data.name, data.classes)
    for part in (data.train, data.defense, data.test):
        size: int = len(part)
        digest.add(tuple(data_sets.labels_of(part)))
        for i in range(min(size, LOOKED_AT)):
            digest.add(part[i * size // min(size, LOOKED_AT)][0].cpu())
    return digest.hex()


@dataclass(frozen=True)
class Situation:
    """The recipe, its data and its model before training.

    Args:
        recipe: the experiment.
        data: its data set.
        model: its classifier, without its weights (on the meta device) if it is a registered one; ``None`` where it
            could not be made that way.
    """

    recipe: Recipe
    data: data_sets.Data
    model: nn.Module | None

    @property
    def kind(self) -> Kind:
        """Images or tables."""
        return "tables" if len(self.data.shape) == 1 else "images"

    def rows(self, kind: str) -> list[Row]:
        """Rows of a kind."""
        return [row for row in self.recipe.rows if row.kind == kind]

    def interpreters(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Every interpreter of a row or member: its place in the recipe, its name, its settings."""
        for row in self.rows("interpreter"):
            yield f"interpreters: {row.label!r}", row.name, row.settings if isinstance(row.settings, dict) else {}
        for row in self.rows("defense"):
            for member in members_of(row):
                yield f"defenses: member {str(member)!r} of {row.label!r}", member.name, dict(member.settings)


def members_of(row: Row) -> tuple[InterpreterSpec, ...]:
    """The interpreters that a defense is made of, by name."""
    members = getattr(row.settings, "members", ())
    return tuple(m for m in members if isinstance(m, InterpreterSpec)) if isinstance(members, tuple) else ()


def _installable(recipe: Recipe) -> list[tuple[str, Any]]:
    """Attacks, metrics and interpreters with a method ``ready``, which raises where something is missing."""
    named = [(f"attacks: {column.label!r}", column.attack) for column in recipe.columns]
    named += [(f"metrics: {name!r}", metric) for name, metric in recipe.metrics.items()]
    named += [(f"interpreters: {row.label!r}", row.settings) for row in recipe.rows if row.kind == "interpreter"]
    seen: dict[Any, str] = {}
    for label, component in named:
        if hasattr(component, "ready"):
            seen.setdefault(repr(component), label)
    by_label = dict(named)
    return [(label, by_label[label]) for label in seen.values()]


def _model(recipe: Recipe, data: data_sets.Data) -> nn.Module | None:
    """The classifier without its memory: a registered one on the meta device; a user's own code is run.

    Raises:
        InputError: an unknown architecture, or weights that do not fit.
    """
    settings = recipe.model
    if settings.file is not None:
        return settings.load(data.shape, data.num_classes, 0)
    size = settings.sizes(data.shape, data.num_classes)
    try:
        with torch.device("meta"):
            model = models.build(settings.name, **size, **settings.options)
        if next((p for p in model.parameters() if not p.is_meta), None) is not None:
            return None
    except InputError:
        raise
    except Exception:
        # A model that cannot be built on the meta device is not checked here.
        return None
    if settings.weights is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that copying to the meta device does nothing
            load_file_into(model, settings.weights, settings.weights_key)
    return settings.adapted(model)


def empty_test(of: Situation) -> list[str]:
    """An empty test part."""
    empty = not len(of.data.test)
    return [f"data: the test part of {of.data.name} is empty; see data.fractions"] if empty else []


def faulty_samples(of: Situation) -> list[str]:
    """Files that cannot be read, and samples that are not what the data set says."""
    return [f"data: {line}" for line in data_sets.findings(of.data)]


def pixels_of_tables(of: Situation) -> list[str]:
    """Attacks that move pixels, on a table."""
    return [
        f"attacks: {column.label!r} moves the pixels of images, and {of.data.name} is a table; on tables only "
        "`clean` stands beside manipulations"
        for column in of.recipe.columns
        if of.kind == "tables" and "tables" not in column.attack.takes
    ]


def no_samples_for_the_adversary(of: Situation) -> list[str]:
    """Attacks and manipulations that need samples where there are none."""
    if len(of.data.train) + len(of.data.defense):
        return []
    empty = f"and the defense and train parts of {of.data.name} are empty; see data.fractions"
    return [
        f"attacks: {column.label!r} needs images of the adversary's own, {empty}"
        for column in of.recipe.columns
        if column.attack.needs_data or column.goal_map == "random-class"
    ] + [
        f"manipulations: {row.label!r} needs samples of the adversary's own, {empty}"
        for row in of.rows("manipulation")
        if row.settings.needs_data
    ]


def nothing_to_train_on(of: Situation) -> list[str]:
    """Components that train on a part of the data that is empty."""
    trains = [("model.train:", "train")] if of.recipe.model.train else []
    trains += [
        (f"interpreters: {row.label!r}", "train")
        for row in of.rows("interpreter")
        if INTERPRETERS.get(row.name).train is not None
    ]
    trains += [(f"defenses: {row.label!r}", row.settings.part) for row in of.rows("defense") if row.settings.needs_data]
    return [
        f"{what} trains, and the {part} part of {of.data.name} is empty; see data.fractions"
        for what, part in trains
        if not len(getattr(of.data, part))
    ]


def interpreters_of_another_kind(of: Situation) -> list[str]:
    """Interpreters of tables on images, and the other way round."""
    kinds = [(where, name, accepted_kinds(INTERPRETERS.get(name).build)) for where, name, _ in of.interpreters()]
    return [
        f"{where}: {name} takes {' and '.join(accepted)}, and {of.data.name} holds {of.kind}"
        for where, name, accepted in kinds
        if of.kind not in accepted
    ]


def metrics_of_another_kind(of: Situation) -> list[str]:
    """Metrics of images on tables."""
    return [
        f"metrics: {name!r} takes {' and '.join(metric.takes)}, and {of.data.name} holds {of.kind}"
        for name, metric in of.recipe.metrics.items()
        if of.kind not in metric.takes
    ]


def another_size(of: Situation) -> list[str]:
    """A model for images of one size only, and images of another."""
    side = getattr(of.model, "input_size", None)
    if of.model is None or of.kind == "tables" or side in (None, of.data.shape[-1]):
        return []
    try:
        _forward(of)
    except AssertionError as error:
        # How timm's and torchvision's transformers refuse an image.
        return [f"model: {of.recipe.model.name} refuses images of shape {list(of.data.shape)}: {error}"]
    except Exception:  # errors that only a run on real inputs can decide
        return []
    return []


def another_answer(of: Situation) -> list[str]:
    """An output that the model does not have, or several logits where one is said to be given."""
    settings = of.recipe.model
    if of.model is None or settings.file is not None or (settings.output is None and not settings.binary):
        return []
    try:
        _forward(of)
    except InputError as error:
        return [f"model.{'binary' if settings.output is None else 'output'}: {error}"]
    except Exception:  # another check's, or only a run on real inputs can decide
        return []
    return []


def another_order_of_classes(of: Situation) -> list[str]:
    """A pretrained head whose classes are those of the data, in another order: labels would mean others."""
    inputs = getattr(of.model, "inputs", None)
    own, given = tuple(getattr(inputs, "class_names", ())), tuple(map(str, of.data.classes))
    if own == given or sorted(own) != sorted(given):
        return []
    place = next(i for i, (a, b) in enumerate(zip(own, given, strict=True)) if a != b)
    return [
        f"model: class {place} of {of.recipe.model.name} is {own[place]!r}, that of {of.data.name} {given[place]!r}: "
        "the same classes in another order"
    ]


def _forward(of: Situation) -> None:
    assert of.model is not None
    device = next((p.device for p in of.model.parameters()), torch.device("cpu"))
    of.model(torch.zeros(1, *of.data.shape, device=device, requires_grad=True))


def unknown_layers(of: Situation) -> list[str]:
    """Layers that the model does not have."""
    lines = []
    for where, _, settings in of.interpreters():
        if of.model is not None and isinstance(settings.get("layer"), str):
            try:
                submodule(of.model, settings["layer"])
            except InputError as error:
                lines.append(f"{where}: {error}")
    return lines


def no_attention(of: Situation) -> list[str]:
    """Attention rollout on a model without attention."""
    wanted = [w for w, name, _ in of.interpreters() if INTERPRETERS.get(name).build is AttentionRollout]
    if not wanted or of.model is None or of.kind == "tables":
        return []
    seen: list[torch.Tensor] = []
    try:
        with Attentions(seen.append):
            _forward(of)
    except Exception:  # another check's, or only a run on real inputs can decide
        return []
    problem = f"{of.recipe.model.name} computes no self-attention, which attention rollout follows"
    return [] if seen else [f"{where}: {problem}; use gradcam or gradient" for where in wanted]


def no_coefficients(of: Situation) -> list[str]:
    """Coefficients asked of a model that has none."""
    wanted = [w for w, name, _ in of.interpreters() if INTERPRETERS.get(name).build is Theta]
    if of.model is None or explains_itself(of.model):
        return []
    problem = (
        f"{of.recipe.model.name} is no self-explaining network: use model senn, or the defense senn on another row"
    )
    return [f"{where}: {problem}" for where in wanted]


def large_pools(of: Situation) -> list[str]:
    """Gradients averaged over squares that are larger than the image."""
    side = min(of.data.shape[1:], default=0)
    return [
        f"{where}: pool is {settings['pool']}, and images of {of.data.name} are {list(of.data.shape[1:])}"
        for where, name, settings in of.interpreters()
        if of.kind == "images" and INTERPRETERS.get(name).build is Gradient and settings.get("pool", 1) > side
    ]


def members_that_are_not_made(of: Situation) -> list[str]:
    """Members of a defense that a model alone does not make, and that no row below has."""
    rows = {row.label: row for row in of.recipe.rows}
    return [
        f"defenses: {row.label!r} cannot have the member {str(member)!r}: {member.refusal}"
        for row in of.rows("defense")
        for member in members_of(row)
        if member.refusal is not None and member.name not in {part.name for part in standing_on(row, rows)}
    ]


def defenses_that_do_not_fit(of: Situation) -> list[str]:
    """Defenses that no system of such inputs can have, as their settings stand."""
    found = [(row.label, row.settings.misfit(of.data.shape)) for row in of.rows("defense")]
    return [f"defenses: {label!r}: {why}" for label, why in found if why is not None]


def interpreters_that_do_not_fit(of: Situation) -> list[str]:
    """Defenses of a method that they cannot defend."""
    rows = {row.label: row for row in of.recipe.rows}
    lines = []
    for row in of.rows("defense"):
        name = interpreter_of(rows[row.base], rows)
        build: Any = INTERPRETERS.get(name).build if name in INTERPRETERS else None
        why = None if build is None else row.settings.unfit(build)
        if why is not None:
            lines.append(f"defenses: {row.label!r}: {why}")
    return lines


def too_few_samples(of: Situation) -> list[str]:
    """Defenses that keep more samples than their part of the data has; that it has none is said elsewhere."""
    found = [(row.label, row.settings) for row in of.rows("defense") if row.settings.fewest > 1]
    return [
        f"defenses: {label!r} needs at least {settings.fewest} samples, and the {settings.part} part of "
        f"{of.data.name} has {len(getattr(of.data, settings.part))}"
        for label, settings in found
        if 0 < len(getattr(of.data, settings.part)) < settings.fewest
    ]


def no_rectifiers(of: Situation) -> list[str]:
    """What replaces or guides rectifiers, on a model that calls none."""
    wanted = [where for where, name, _ in of.interpreters() if "rectifiers" in INTERPRETERS.get(name).needs]
    wanted += [f"defenses: {row.label!r}" for row in of.rows("defense") if "rectifiers" in DEFENSES.get(row.name).needs]
    model = of.model
    if not wanted or model is None:
        return []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other kinks, which are said when the row is made
            require_rectifiers(model, torch.zeros(1, *of.data.shape, device=device), "it")
    except UnsupportedModelError as error:
        return [f"{where}: {error}" for where in wanted]
    except Exception:  # another check's, or only a run on real inputs can decide
        return []
    return []


def harmless_changes_of_another_kind(of: Situation) -> list[str]:
    """Harmless changes that do not change such inputs, and a distance that does not compare such maps."""
    return of.recipe.evaluation.problems(of.kind, of.data.name)


FINDINGS: tuple[Callable[[Situation], list[str]], ...] = (
    empty_test,
    faulty_samples,
    pixels_of_tables,
    no_samples_for_the_adversary,
    nothing_to_train_on,
    interpreters_of_another_kind,
    metrics_of_another_kind,
    another_size,
    another_answer,
    another_order_of_classes,
    unknown_layers,
    no_attention,
    no_coefficients,
    large_pools,
    members_that_are_not_made,
    defenses_that_do_not_fit,
    interpreters_that_do_not_fit,
    too_few_samples,
    no_rectifiers,
    harmless_changes_of_another_kind,
)
"""The checks: each gives a line for each mistake of one kind."""
