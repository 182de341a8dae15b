"""What one experiment is: model, rows, columns and how it is judged, as a recipe describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn

from .. import files, models
from ..checks import Kind
from ..data.own import OwnData
from ..errors import FieldError, InputError
from ..features import index_of, with_indices
from ..fields import Count, Natural, NonNegative, check_fields
from ..own_code import OwnCode
from ..random_streams import derive
from ..schema import make
from ..training import Training
from ..transforms import HarmlessChange
from .auditing import Auditing
from .plausible import Plausible, bare
from .problems import Problems
from .scanning import Scanning
from .spelled import spelled

Knowledge = Literal["oblivious", "transfer", "adaptive"]
GoalMap = Literal["benign", "random-patch", "random-class"]


@dataclass(frozen=True)
class Model:
    """The classifier: a registered name, ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME``, its weights, its training.

    Args:
        name: as ``models.load`` takes it; with ``file`` a class or function that stands there and makes an
            ``nn.Module``.
        weights: a safetensors file or a ``weights_only`` torch file.
        weights_key: which of a checkpoint's state dicts, such as ``state_dict_ema``; default the usual ones.
        pretrained: load the library's own weights.
        train: train it here, on the data set's train part.
        options: further arguments of its builder, such as the widths of an ``mlp``.
        output: which of its outputs the logits are, by key or place, where it answers with several.
        binary: it gives one logit for the two classes of the data.
        file: a Python file of one's own; its code runs only with ``--trust-code``.
        sha256: of ``file``, filled in when the recipe is read; another content is refused.
        trusted: whether the user trusts ``file``; no recipe can say so.
    """

    name: str
    weights: str | None = None
    weights_key: str | None = None
    pretrained: bool | None = None
    train: Training | None = None
    options: dict[str, Any] = field(default_factory=dict)
    output: str | int | None = None
    binary: bool = False
    file: str | None = None
    sha256: str | None = None
    trusted: bool = field(default=False, metadata={"recipe": False})

    @property
    def code(self) -> OwnCode | None:
        """The user's own code that makes it; ``None`` for a registered name."""
        return None if self.file is None else OwnCode(self.file, self.name, self.sha256, self.trusted)

    def load(self, shape: Sequence[int], num_classes: int, seed: int) -> nn.Module:
        """The classifier for inputs of that shape, ``(C, H, W)`` or ``(D,)``, with its weights, not trained here.

        Raises:
            InputError: what ``models.load`` and ``models.load_own`` refuse.
        """
        if self.code is not None:
            return models.load_own(
                self.code, shape, num_classes, options=self.options, weights=self.weights,
                weights_key=self.weights_key, seed=seed, output=self.output, binary=self.binary,
            )  # fmt: skip
        return self.adapted(models.load(
            self.name, weights=self.weights, weights_key=self.weights_key, pretrained=self.pretrained, seed=seed,
            **self.sizes(shape, num_classes), **self.options,
        ))  # fmt: skip

    def sizes(self, shape: Sequence[int], num_classes: int) -> dict[str, int]:
        """The keyword arguments of a registered builder that follow from the data.

        Raises:
            InputError: one logit for other than two classes.
        """
        if self.binary and num_classes != 2:
            raise InputError(f"binary: one logit is for two classes, and the data have {num_classes}")
        size = {"in_features" if len(shape) == 1 else "in_channels": int(shape[0])}
        return {"num_classes": 1 if self.binary else num_classes, **size}

    def adapted(self, model: nn.Module) -> nn.Module:
        """What its builder made, as a classifier."""
        return models.adapted(model, self.output, self.binary)

    def named(self, features: Sequence[str]) -> Model:
        """The same with places for the names of columns, where its builder takes ``columns``.

        Raises:
            InputError: a column that the data do not have.
        """
        if "columns" not in self.options:
            return self
        places = [index_of(column, features) for column in self.options["columns"]]
        return replace(self, options={**self.options, "columns": places})


@dataclass(frozen=True)
class Evaluation:
    """How cells are judged.

    Args:
        images: how many images, from the test part; as many as there are if fewer.
        batch_size: of a chunk; chunks are what processes share and what a killed run keeps.
        targeted: attacks aim at a random other class; otherwise at any other class.
        only_correct: judge only images that the classifier gets right (Zhang et al. 2020, section 4).
        plausible: when a map resembles the one that it should; by default, if it is no further from it than 95% of
            harmless changes move this row's maps, of the kind that moves them most.
        harmless: what reaches the systems with no adversary; empty: the usual changes of the kind of input. Each row is
            calibrated on them, and so are its detectors, unless their defense names others.
        calibration: how many inputs a row is calibrated on, each after every kind of harmless change; 0: none, where
            ``plausible`` is an IoU.
        bootstrap: resamples for the 95% intervals.
        pictures: how many images the report shows for each cell.
        pool: how many images of the defense part (else the train part) adversaries have of their own, where an attack
            is fitted on data or takes maps of other images.
    """

    images: Count = 128
    batch_size: Count = 32
    targeted: bool = True
    only_correct: bool = True
    plausible: Plausible = field(default_factory=Plausible)
    harmless: tuple[HarmlessChange, ...] = ()
    calibration: Natural = 100
    bootstrap: Count = 2000
    pictures: Count = 6
    pool: Count = 256

    def __post_init__(self) -> None:
        if isinstance(self.plausible, (int, float)):
            raise FieldError("Evaluation", "plausible", bare(self.plausible))
        object.__setattr__(self, "harmless", tuple(self.harmless))
        check_fields(self)
        least = self.plausible.least
        if self.calibration < least:
            why = f"for the {self.plausible.quantile:g} quantile of distances, got {self.calibration!r}"
            raise FieldError("Evaluation", "calibration", f"must be at least {least} {why}")

    def problems(self, kind: Kind, data: str) -> list[str]:
        """What of it does not fit inputs of that kind, a line each: harmless changes, the distance of maps.

        Args:
            kind: images or tables.
            data: the data set's name.
        """
        lines = [
            f"evaluation.harmless[{i}]: {change.entry['name']} changes {' and '.join(change.takes)}, and {data} holds "
            f"{kind}"
            for i, change in enumerate(self.harmless)
            if kind not in change.takes
        ]
        if self.calibration and kind not in self.plausible.metric.takes:
            lines.append(f"evaluation.plausible.distance: {self.plausible.distance} does not compare maps of {kind}")
        return lines

    @property
    def entry(self) -> dict[str, Any]:
        """As a recipe writes it, defaults included."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        harmless = [change.entry for change in self.harmless]
        return {**own, "plausible": self.plausible.entry, "harmless": harmless}


@dataclass(frozen=True)
class Sanity:
    """How interpreters are checked (``robustexplain sanity``).

    Args:
        images: how many of the test part are explained.
        stages: in how many steps the network is randomised from the logits down; deep layers share a step.
        shift: constant that the input shift check adds to every pixel.
        label_epochs: epochs on random labels; they are harder to learn than true ones. 0 takes four times the recipe's.
        pictures: how many images have their maps drawn.
    """

    images: Count = 32
    stages: Count = 12
    shift: NonNegative = 0.3
    label_epochs: int = 0
    pictures: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Row:
    """An interpreter, a manipulated system, or a defense of either.

    Args:
        label: as the report writes it.
        base: label of the row it stands on; its own for an interpreter.
        name: registered name of the interpreter, manipulation or defense.
        settings: the manipulation or defense, or the keyword arguments of the interpreter (or of its training).
        root: label of the interpreter row that it all began with.
        kind: what stands in this row.
    """

    label: str
    base: str
    name: str
    settings: Any
    root: str
    kind: Literal["interpreter", "manipulation", "defense"] = "interpreter"

    @property
    def derived(self) -> bool:
        """Whether the row stands on another one."""
        return self.label != self.base


@dataclass(frozen=True)
class AttackFacts:
    """What a report says of an attack: known of a run that is read back, whose attack nobody can make again.

    Args:
        name: of its class.
        needs_maps: whether it looks at maps.
        keeps_prediction: whether the prediction should stay what it is.
        adapts: whether an adversary who knows the defense changes anything about it, but for what it is aimed at.
        control: whether it is no attack, but what one must beat.
        eps: its radius, if it has one.
        steps: of its search, if it has them.
        norm: of the radius, if it says so.
        family: a hash of its other settings: attacks of one family differ in radius and steps alone.
    """

    name: str
    needs_maps: bool
    keeps_prediction: bool
    adapts: bool
    control: bool = False
    eps: float | None = None
    steps: int | None = None
    norm: str | None = None
    family: str = ""

    @classmethod
    def of(cls, attack: Any) -> AttackFacts:
        """The facts of an attack."""
        name = type(attack).__name__
        found = cls(name, attack.needs_maps, attack.keeps_prediction, attack.adapts, attack.control)
        eps, steps, norm = (getattr(attack, setting, None) for setting in ("eps", "steps", "norm"))
        return replace(
            found,
            eps=float(eps) if isinstance(eps, (int, float)) else None,
            steps=steps if isinstance(steps, int) else None,
            norm=norm if isinstance(norm, str) else None,
            family=files.digest([name, *_other_settings(attack)]),
        )

    @property
    def clean(self) -> bool:
        """Whether it changes nothing: no attack, and no evidence for a defense."""
        return self.name == "Clean"

    @property
    def settings(self) -> str:
        """Radius and steps in words, such as ``eps 8/255, 50 steps``."""
        norm = " (L2)" if self.norm == "l2" else ""
        words = [] if self.eps is None or self.clean else [f"eps {spelled(self.eps)}{norm}"]
        words += [] if self.steps is None else [f"{self.steps} step{'' if self.steps == 1 else 's'}"]
        return ", ".join(words)


def _other_settings(attack: Any) -> list[Any]:
    kept = [f.name for f in fields(attack) if f.name not in ("eps", "steps")] if is_dataclass(attack) else []
    return [[name, _told(getattr(attack, name))] for name in kept]


def _told(value: Any) -> Any:
    """A setting as plain data, settings in it too; of what is no setting (a model, a function) its class alone."""
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, [[f.name, _told(getattr(value, f.name))] for f in fields(value) if f.init]]
    if isinstance(value, Mapping):
        return [[str(key), _told(inner)] for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [_told(inner) for inner in value]
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


@dataclass(frozen=True)
class Column:
    """An attack and what its adversary knows.

    Args:
        label: as the report writes it.
        attack: the attack, or the facts of one that was made elsewhere.
        knowledge: ``oblivious`` (takes the deployed classifier for undefended), ``transfer`` (crafts on an undefended
            system of its own making) or ``adaptive`` (knows the defense).
        goal_map: the map that the adversary wants seen.
        source: label of the row whose system the inputs are crafted on, whatever is judged; ``None``: the judged one.
    """

    label: str
    attack: Any
    knowledge: Knowledge = "oblivious"
    goal_map: GoalMap = "benign"
    source: str | None = None

    @cached_property
    def facts(self) -> AttackFacts:
        """What the report says of the attack."""
        return self.attack if isinstance(self.attack, AttackFacts) else AttackFacts.of(self.attack)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Which systems meet which attacks, and how that is judged.

    Args:
        name: what the report is called.
        about: what it shows.
        seed: of everything.
        rows: what is deployed; a row stands on an earlier one.
        columns: attacks.
        metrics: metrics by name, of kinds that a cell can measure; ``iou`` among them.
        evaluation: how cells are judged.
        audit: how cells are checked before they are believed.
        source: what decides the results, as plain data.
    """

    name: str
    about: str = ""
    seed: int = 0
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    metrics: dict[str, Any]
    evaluation: Evaluation
    audit: Auditing = field(default_factory=Auditing)
    source: dict[str, Any] = field(repr=False, default_factory=dict)

    def row(self, label: str) -> Row:
        """The row of that label."""
        return next(row for row in self.rows if row.label == label)

    def manipulated(self, row: Row) -> bool:
        """Whether a manipulation stands in this row, or below it."""
        while row.derived and row.kind != "manipulation":
            row = self.row(row.base)
        return row.kind == "manipulation"

    def undefended(self, row: Row) -> Row:
        """The nearest row below in which no defense stands; itself, if none stands in it, or if it is the root."""
        while row.derived and row.kind == "defense":
            row = self.row(row.base)
        return row

    def reference(self, row: Row) -> Row:
        """What a row is compared with: the undefended one; a manipulated row with the honest one."""
        return self.undefended(row) if row.kind == "defense" else self.row(row.root)

    @property
    def trains_replicas(self) -> bool:
        """Whether transfer attacks have a classifier of the adversary's own making."""
        return False

    @property
    def digest(self) -> str:
        """A hash of what decides the results."""
        return files.digest(decisive(self.source))


@dataclass(frozen=True, kw_only=True)
class Recipe(Experiment):
    """One experiment of registered components, checked; ``source`` is the resolved recipe.

    Args:
        data: the data set, not loaded yet.
        model: the classifier.
        sanity: how interpreters are checked.
        scan: how models are scanned for what their owner may have done to them.
        seeds: how many times every trained part is made, each time under other seeds.
        repeat: which of these times this is; the run directory of a recipe with ``seeds`` holds one of each further.
    """

    data: Any
    model: Model
    sanity: Sanity = field(default_factory=Sanity)
    scan: Scanning = field(default_factory=Scanning)
    seeds: int = 1
    repeat: int = 0

    @property
    def training_seed(self) -> int:
        """Of all that is trained; inputs, their goals and their harmless changes have ``seed`` in every repeat."""
        return derive(self.seed, "repeat", self.repeat) % 2**32 if self.repeat else self.seed

    @property
    def trains_replicas(self) -> bool:
        """Whether the adversary trains the classifier again, under another seed."""
        return self.model.train is not None

    def named(self, features: Sequence[str]) -> Recipe:
        """The recipe with places for the names of columns.

        Raises:
            InputError: a column that the data do not have; every problem that was found.
        """
        problems = Problems()
        rows = [
            problems.run(lambda r=r: replace(r, settings=with_indices(r.settings, features)), r.label)
            for r in self.rows
        ]
        metrics = {n: problems.run(lambda m=m: with_indices(m, features), n) for n, m in self.metrics.items()}
        model = problems.run(lambda: self.model.named(features), "model.options")
        problems.stop()
        return replace(self, rows=tuple(rows), metrics=metrics, model=model)

    def trusting(self) -> Recipe:
        """The same with the user's word that code of the user's own may run."""
        data = replace(self.data, trusted=True) if isinstance(self.data, OwnData) else self.data
        return replace(self, model=replace(self.model, trusted=True), data=data)

    @property
    def code(self) -> tuple[OwnCode, ...]:
        """The user's own code that this experiment runs."""
        own = (self.model.code, self.data.code if isinstance(self.data, OwnData) else None)
        return tuple(code for code in own if code is not None)


def decisive(source: dict[str, Any]) -> dict[str, Any]:
    """What of a resolved recipe decides a matrix: no description, sanity checks or scans; own code by content."""
    kept = {key: value for key, value in source.items() if key not in ("name", "about", "sanity", "scan")}
    for key in ("model", "data"):
        entry = kept.get(key)
        if isinstance(entry, dict) and entry.get("sha256") is not None:
            kept[key] = {k: v for k, v in entry.items() if k != "file"}
    return kept


def foundation(source: dict[str, Any]) -> dict[str, Any]:
    """What every cell of a matrix stands on: data, model, seed, and which inputs are judged and how.

    Rows, columns and metrics do not belong to it: they may come, go and change in one run directory.
    """
    judging = _with_defaults(source.get("evaluation") or {})
    kept = {key: value for key, value in decisive(source).items() if key in ("data", "model")}
    kept["seed"] = source.get("seed", 0)
    kept |= {"repeat": source["repeat"]} if source.get("repeat") else {}
    kept["evaluation"] = {key: value for key, value in judging.items() if key not in ("bootstrap", "pictures")}
    return kept


def _with_defaults(evaluation: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = make(Evaluation, evaluation, "evaluation").entry
    except InputError:  # of an earlier version, only to be told apart
        return dict(evaluation)
    return found
