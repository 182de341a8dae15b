"""From a recipe to the systems that the matrix judges: trained, loaded, defended, each made once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import data as data_sets
from .. import files, models
from ..data import InputSpec
from ..errors import InputError, at_work, memory_advice, recorded
from ..files import digest, digest_tensors
from ..fingerprint import fingerprint
from ..progress import Labelled
from ..random_streams import derive
from ..recipe.experiment import Experiment, Model, Recipe, Row
from ..registry import DEFENSES, INTERPRETERS
from ..seals import sha256_of
from ..storage import checksum
from ..system import System, on_model
from ..training import Session, cross_entropy, fit
from .origins import Origins
from .store import LABEL, MADE_OF, RunFolder


@dataclass
class Prepared:
    """Every system of a run, by row label; a row that could not be made has its traceback instead.

    Args:
        by_row: what is judged.
        replicas: undefended systems of the attacker's own making, by root label (for transfer attacks).
        failures: tracebacks by row label.
    """

    by_row: dict[str, System] = field(default_factory=dict)
    replicas: dict[str, System] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class Builder:
    """Makes the systems of a recipe's rows, each once; what was trained before is read from the session's folder.

    Args:
        recipe: the experiment, columns of tables by their places.
        data: the data set.
        session: accelerator, checkpoints, progress.
        model: the classifier; default the recipe's.
    """

    def __init__(self, recipe: Recipe, data: data_sets.Data, session: Session, model: nn.Module | None = None) -> None:
        self.recipe, self.data, self.session = recipe, data, session
        self.model = (
            classifier(recipe.model, data, recipe.training_seed, session, "classifier") if model is None else model
        )
        self.weights = digest_tensors(self.model.state_dict())
        self._systems: dict[str, System] = {}
        self._failures: dict[str, str] = {}
        self._hardened: dict[str, nn.Module] = {}

    def system(self, row: Row) -> System:
        """The system of a row, and of those below it.

        Raises:
            Exception: whatever went wrong, at the first call; a row that stands on one that failed says so.
        """
        if row.label in self._failures:
            raise InputError(f"{row.label} could not be made:\n{self._failures[row.label]}")
        if row.label not in self._systems:
            try:
                made = self._made(row)
                self._systems[row.label] = replace(made, inputs=InputSpec.of_data(self.data))
            except Exception as error:
                _stop_all(self.session, error)
                self._failures[row.label] = recorded(error)
                raise
        return self._systems[row.label]

    def _made(self, row: Row) -> System:
        base = self.system(self.recipe.row(row.base)) if row.derived else None
        with at_work(row.label):
            return self._undefended(row, self.model, self.session) if base is None else self._on(row, base)

    def _on(self, row: Row, base: System) -> System:
        if row.kind == "defense" and _hardens(row):
            return self._on_hardened(row, base)
        session = self.session.inside(digest(row.label))
        made: System = row.settings(base, self._part(row), labelled(session, row.label, row.settings.needs_data))
        return made

    def _part(self, row: Row) -> Any:
        """The part of the data that a row is trained on; ``None`` where it is empty."""
        part = getattr(self.data, getattr(row.settings, "part", "defense"))
        if not len(part) and row.kind == "manipulation":
            part = self.data.train
        return part if len(part) else None

    def hardened(self, row: Row, model: nn.Module) -> tuple[nn.Module, str]:
        """A row's model defense applied to ``model``, trained once for all rows that ask for the same.

        Returns:
            The hardened model, and the name of its folder of checkpoints: a hash of defense, weights and data.

        Raises:
            InputError: the part of the data that it trains on is empty.
        """
        name = digest([fingerprint(row.settings), digest_tensors(model.state_dict()), self.data.digest])
        if name not in self._hardened:
            part, session = self._part(row), labelled(self.session.inside(name), row.label)
            if part is None:
                raise InputError(f"{row.label} trains the classifier, and the part of the data that it needs is empty")
            self._hardened[name] = row.settings.hardened(model, part, session)
        return self._hardened[name], name

    def _on_hardened(self, row: Row, base: System) -> System:
        """The root's interpreter, made (and trained) anew on the hardened model; a manipulated one is carried over."""
        below = self.recipe.row(row.base)
        if below.kind == "defense" and not _hardens(below):
            raise InputError(
                f"{row.label} hardens the model and stands on {row.base}, where {below.name} was applied already; "
                "defenses stack in the order model, input, interpreter, detector: harden the model first"
            )
        model, folder = self.hardened(row, base.model)
        if self.recipe.manipulated(row):
            made = replace(base, model=model, interpreter=on_model(base.interpreter, model))
        else:
            made = self._undefended(self.recipe.row(row.root), model, self.session.inside(folder))
        return replace(made, defenses=(*base.defenses, DEFENSES.name_of(type(row.settings))))

    def _undefended(self, row: Row, model: nn.Module, session: Session) -> System:
        weights = self.weights if model is self.model else digest_tensors(model.state_dict())
        return undefended(row, model, self.data, self.recipe.training_seed, [self.data.digest, weights], session)

    def replicas(self, rows: list[Row]) -> dict[str, System]:
        """The undefended systems that a transfer attack is crafted on, by label: the same recipe under another seed.

        A classifier that is not trained here has no other seed: the attacker then has the deployed weights.
        """
        if not self.recipe.trains_replicas:
            return {row.label: self.system(row) for row in rows}
        seed = derive(self.recipe.training_seed, "replica") % 2**32
        inner = self.session.inside("replica")
        model = classifier(self.recipe.model, self.data, seed, inner, "classifier of the attacker")
        identity = [self.data.digest, digest_tensors(model.state_dict())]
        return {row.label: undefended(row, model, self.data, seed, identity, inner) for row in rows}


def prepare(builder: Builder, folder: RunFolder) -> Prepared:
    """Train or load everything that the matrix needs; what is done already is read from the run directory."""
    recipe, session, made = builder.recipe, builder.session, Prepared()
    for row in recipe.rows:
        try:
            made.by_row[row.label] = builder.system(row)
        except Exception as error:
            # One row that cannot be made must not take the others with it: its cells become holes in the report.
            _stop_all(session, error)
            made.failures[row.label] = recorded(error)
            session.progress.say(f"{row.label} could not be made; its cells stay empty: {_last_line(error)}")
    if session.accelerator.is_main_process:
        save(recipe, made, folder, session)
    if any(column.knowledge == "transfer" for column in recipe.columns):
        roots = {row.root for row in recipe.rows}
        made.replicas = builder.replicas([recipe.row(label) for label in made.by_row if label in roots])
    return made


def _last_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    advice = memory_advice(text)
    return f"{text} ({advice})" if advice else text


def _stop_all(session: Session, error: Exception) -> None:
    """Raise ``error`` again where nothing else can go on: a full disk, or other processes that would wait for ever.

    Bad input is found in all processes alike; a full disk or memory is not, and only the launcher can stop the others.
    """
    if files.is_full(error) or (session.accelerator.num_processes > 1 and not isinstance(error, InputError)):
        raise error


def save(experiment: Experiment, prepared: Prepared, folder: RunFolder, session: Session) -> None:
    """Save every system that can be saved, and note the reason beside those that cannot."""
    origins = Origins(experiment)
    for row in experiment.rows:
        system, path = prepared.by_row.get(row.label), folder.system(row.label)
        if system is None or folder.unsaved(row.label) is not None:
            continue
        if (path / "system.json").is_file() and _in_order(folder, row.label, session):
            continue
        try:
            system.save(path)
            folder.note_system(row.label)
        except InputError as error:
            # A part that no registered builder makes can be judged all the same; it only cannot be loaded again.
            session.progress.say(f"{row.label} is not saved: {error}")
            folder.note_unsaved(row.label, str(error))
        files.write_text(path / MADE_OF, origins.system(row.label))


def _in_order(folder: RunFolder, row: str, session: Session) -> bool:
    """Whether a row's saved system is what was saved; a damaged one is saved anew."""
    try:
        expected, found = folder.system_sum(row), checksum(folder.system(row))
    except (InputError, OSError) as error:
        session.progress.say(f"damaged: {error}; the system is saved anew")
        return False
    if expected is None:
        folder.note_system(row)
    elif expected != found:
        session.progress.say(f"damaged: {folder.system(row)} holds another system; it is saved anew")
        return False
    return True


def classifier(settings: Model, data: data_sets.Data, seed: int, session: Session, name: str) -> nn.Module:
    """The classifier, trained on the data set's train part if the recipe says so; frozen, in eval mode."""
    model = settings.load(data.shape, data.num_classes, derive(seed, "model") % 2**32)
    network = models.innermost(model)
    if isinstance(network, models.TableClassifier) and settings.weights is None:
        network.standardise(data_sets.stack(data.train)[0])
    if settings.train is not None:
        # Not the initial weights: what is drawn from a seed differs in last bits between kinds of machine.
        weights = None if settings.weights is None else sha256_of(Path(settings.weights).expanduser())
        asked = replace(settings, file=None, weights=weights, train=None, trusted=False)
        fit(model, cross_entropy, data.train, settings.train, name=name, seed=seed, session=session,
            identity=[data.digest, asdict(asked)])  # fmt: skip
    return model.to(session.device).requires_grad_(False).eval()


def undefended(
    row: Row, model: nn.Module, data: data_sets.Data, seed: int, identity: object, session: Session
) -> System:
    """The system of an interpreter's row, the interpreter trained on the train part where it needs that."""
    entry = INTERPRETERS.get(row.name)
    if entry.train is None:
        return System(model, entry.build(model, **row.settings))
    inner = labelled(session.inside(digest(row.label)), row.label)
    interpreter = entry.train(model, data.train, row.settings, seed=seed, session=inner, identity=identity)
    return System(model, interpreter)


def labelled(session: Session, label: str, trains: bool = True) -> Session:
    """The same session, what trains in it being shown under a row's label, which stands beside the checkpoints."""
    path = None if session.folder is None else session.folder / LABEL
    if trains and path is not None and session.accelerator.is_main_process and not path.is_file():
        files.write_text(path, label)
    return replace(session, progress=Labelled(session.progress, label))


def _hardens(row: Row) -> bool:
    """Whether a row's defense hardens the model: it is trained once, whatever explains it."""
    return callable(getattr(row.settings, "hardened", None))
