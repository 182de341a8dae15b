"""From a recipe to the systems that the matrix judges: trained, loaded, defended, each row on its own."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import data as data_sets
from .. import models
from ..errors import InputError
from ..files import digest, digest_tensors
from ..random_streams import derive
from ..recipe.experiment import Model, Recipe, Row
from ..registry import INTERPRETERS
from ..system import System
from ..training import Session, cross_entropy, fit
from .store import RunFolder


@dataclass
class Systems:
    """Every system of a run, by row label; a row that could not be made has its traceback instead.

    Args:
        model: the classifier that is deployed.
        systems: by row label.
        replicas: undefended systems of the attacker's own making, by base label (for inputs that are carried over).
        failures: tracebacks by row label.
    """

    model: nn.Module
    systems: dict[str, System] = field(default_factory=dict)
    replicas: dict[str, System] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def prepare(recipe: Recipe, data: data_sets.Data, folder: RunFolder, session: Session) -> Systems:
    """Train or load everything that the matrix needs; what is done already is read from the run directory."""
    model = classifier(recipe.model, data, recipe.seed, session, "classifier")
    weights = digest_tensors(model.state_dict())
    if session.accelerator.is_main_process:
        folder.same_weights(weights)
    identity = [data.digest, weights]
    made = Systems(model)
    for row in recipe.rows:
        try:
            made.systems[row.label] = _system(row, made, data, recipe.seed, identity, session)
        except Exception:
            # One row that cannot be made must not take the others with it: its cells become holes in the report.
            made.failures[row.label] = traceback.format_exc()
            session.progress.say(f"[red]{row.label} could not be made[/red]; its cells stay empty")
    if session.accelerator.is_main_process:
        _save(made, folder, session)
    if any(column.knowledge == "transfer" for column in recipe.columns):
        _replicas(recipe, data, made, session)
    return made


def _save(made: Systems, folder: RunFolder, session: Session) -> None:
    for label, system in made.systems.items():
        if (folder.system(label) / "system.json").is_file():
            continue
        try:
            system.save(folder.system(label))
        except InputError as error:
            # A part that no registered builder makes can be judged all the same; it only cannot be loaded again.
            session.progress.say(f"{label} is not saved: {error}")


def classifier(settings: Model, data: data_sets.Data, seed: int, session: Session, name: str) -> nn.Module:
    """The classifier, trained on the data set's train part if the recipe says so; frozen, in eval mode."""
    size = {"in_features" if len(data.shape) == 1 else "in_channels": data.shape[0]}
    model: nn.Module = models.load(
        settings.name,
        num_classes=data.num_classes,
        weights=settings.weights,
        pretrained=settings.pretrained,
        seed=derive(seed, "model") % 2**32,
        **size,
        **settings.options,
    )
    if isinstance(model, models.TableClassifier) and settings.weights is None:
        model.standardise(data_sets.stack(data.train)[0])
    if settings.train is not None:
        start = digest_tensors(model.state_dict())
        fit(model, cross_entropy, data.train, settings.train, name=name, seed=seed, session=session,
            identity=[data.digest, settings.name, settings.options, start])  # fmt: skip
    return model.to(session.device).requires_grad_(False).eval()


def _system(row: Row, made: Systems, data: data_sets.Data, seed: int, identity: object, session: Session) -> System:
    if not row.derived:
        return undefended(row, made.model, data, seed, identity, session)
    base = made.systems[row.base] if row.base in made.systems else _raise_base(row, made)
    part = getattr(data, row.settings.part if row.kind == "defense" else "defense")
    part = part if len(part) else None
    if part is None and row.kind == "manipulation":
        part = data.train if len(data.train) else None
    defended: System = row.settings(base, part, session.inside(digest(row.label)))
    return defended


def _raise_base(row: Row, made: Systems) -> System:
    raise RuntimeError(f"{row.label} stands on {row.base}, which could not be made:\n{made.failures[row.base]}")


def undefended(
    row: Row, model: nn.Module, data: data_sets.Data, seed: int, identity: object, session: Session
) -> System:
    """The system of an interpreter's row, the interpreter trained on the train part where it needs that."""
    entry = INTERPRETERS.get(row.name)
    if entry.train is None:
        return System(model, entry.build(model, **row.settings))
    inner = session.inside(digest(row.label))
    interpreter = entry.train(model, data.train, row.settings, seed=seed, session=inner, identity=identity)
    return System(model, interpreter)


def _replicas(recipe: Recipe, data: data_sets.Data, made: Systems, session: Session) -> None:
    """The undefended systems that a transfer attack is crafted on: the same recipe under another seed.

    A classifier that is not trained here has no other seed: the attacker then has the deployed weights.
    """
    bases = [row for row in recipe.rows if not row.derived and row.label in made.systems]
    if recipe.model.train is None:
        made.replicas = {row.label: made.systems[row.label] for row in bases}
        return
    seed = derive(recipe.seed, "replica") % 2**32
    inner = session.inside("replica")
    model = classifier(recipe.model, data, seed, inner, "classifier of the attacker")
    identity = [data.digest, digest_tensors(model.state_dict())]
    for row in bases:
        made.replicas[row.label] = undefended(row, model, data, seed, identity, inner)


@torch.no_grad()
def clean_accuracy(model: nn.Module, data: data_sets.Data, size: int, images: int, device: torch.device) -> float:
    """Accuracy on up to ``images`` samples of the test part."""
    part = data_sets.take(data.test, min(images, len(data.test)))
    right = 0
    for start in range(0, len(part), size):
        x, y = data_sets.stack(part, range(start, min(start + size, len(part))))
        right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    return right / len(part)
