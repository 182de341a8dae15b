"""Base classes of the defenses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from robustexplain import checks
from robustexplain.autograd.second_derivatives import named_derivatives
from robustexplain.data import has_labels, labels_of, stack
from robustexplain.door import answer, suited
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.fields import Natural, check_fields
from robustexplain.interpreters import Interpreter
from robustexplain.random_streams import generator
from robustexplain.registry import DEFENSES
from robustexplain.system import System, on_model
from robustexplain.training import Samples, Session, eval_mode
from robustexplain.training.modes import left_alone

Layer = Literal["model", "input", "interpreter", "detector"]
"""The part of a system that a defense changes, in the order in which defenses stack."""
LAYERS: tuple[Layer, ...] = get_args(Layer)
_DOES = dict(
    zip(
        LAYERS, ("hardens the model", "transforms the input", "hardens the interpreter", "adds a detector"), strict=True
    )
)


@dataclass(frozen=True)
class Defense(ABC):
    """Makes a system harder to deceive: ``defense(system, data=None, session=None)`` gives a new system.

    The given system is not changed. A subclass implements ``_defend``.

    Args:
        seed: of everything random in the defense.
    """

    seed: Natural = field(default=0, kw_only=True)

    layer: ClassVar[Layer]
    """The part of the system that it changes."""
    wraps: ClassVar[bool] = False
    """Whether it wraps the interpreter and could wrap any other one as well."""
    defends: ClassVar[tuple[str, ...]] = ()
    """Registered names of the interpreters that it can defend; empty means any."""
    needs_data: ClassVar[bool] = False
    """Whether the defense needs samples: it trains, or keeps some."""
    part: ClassVar[Literal["train", "defense"]] = "defense"
    """The part of the data that these samples are from: the training samples, or those reserved for defenses."""

    def __post_init__(self) -> None:
        check_fields(self)
        if getattr(type(self), "layer", None) not in LAYERS:
            raise InputError(f"{type(self).__name__}.layer must say what it changes: one of {', '.join(LAYERS)}")

    @property
    def name(self) -> str:
        """Its registered name, or the name of its class if it is not registered."""
        cls = type(self)
        return next((entry.name for entry in DEFENSES if entry.build is cls), cls.__name__)

    def __call__(self, system: System, data: Samples | None = None, session: Session | None = None) -> System:
        """The defended system.

        Args:
            system: the deployed system.
            data: the defense's samples, map-style, gives ``(x, label)``; none of them is used in the evaluation.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: no data for a defense that needs some, or data that are none for this classifier; a defense of
                one's own that changes the given model in place.
            UnsupportedModelError: a system that the defense does not support, or one with a defense that this one would
                undo.
        """
        if self.needs_data and (data is None or len(data) == 0):
            raise InputError(f"{type(self).__name__} needs data: samples that the evaluation does not use")
        self._in_order(system)
        if data is not None:
            admit_samples(system.model, data)
        with torch.inference_mode(False), named_derivatives(), left_alone(system.model, self):
            defended = self._defend(system, data, session or Session())
        if not isinstance(defended, System):
            raise InputError(f"{type(self).__name__} must give a System, got {type(defended).__name__}")
        return replace(defended, defenses=(*system.defenses, self.name))

    @abstractmethod
    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        """The defended system; the arguments have been checked."""

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it could not defend a system of inputs of ``shape`` (without the batch); ``None`` where it could.

        A recipe asks before anything is trained.
        """
        return None

    def unfit(self, interpreter: type[Interpreter]) -> str | None:
        """Why it could not defend an interpreter of this class; ``None`` where it could. Asked as :meth:`misfit`."""
        return None

    @property
    def fewest(self) -> int:
        """How many samples it needs at least, for what its settings ask for."""
        return int(self.needs_data)

    def _in_order(self, system: System) -> None:
        """Refuse a system with a defense of a higher layer, which was made for the parts below it as they are."""
        for name, cls in applied(system).items():
            refuse(
                LAYERS.index(self.layer) < LAYERS.index(cls.layer),
                f"defenses stack in the order {', '.join(LAYERS)}; {self.name!r} {_DOES[self.layer]} and the system "
                f"has {name!r} already: apply {self.name} first",
            )

    def oblivious_view(self, defended: System, root: System) -> System:
        """The system that an oblivious attacker assumes: the deployed classifier with the undefended interpreter.

        For a stack, apply the views one after the other, from the last defense to the first: each removes what its
        defense added.

        Args:
            defended: the deployed system.
            root: the undefended system that the first defense was applied to.
        """
        if defended.model is root.model:
            return root.without_detector()
        return System(defended.model, on_model(root.interpreter, defended.model))


def admit_samples(model: nn.Module, data: Samples, count: int = 32) -> None:
    """Refuse samples that a classifier cannot be trained on, by a look at some, and at all labels that are at hand.

    Args:
        model: the classifier.
        data: gives ``(x, label)``.
        count: how many inputs are looked at, drawn at random and each time the same.

    Raises:
        InputError: inputs of several shapes, outside ``[0, 1]`` or not finite; labels that are none of its classes.
    """
    if not len(data):
        return
    x, y = stack(data, torch.randperm(len(data), generator=generator(0, "door"))[:count].tolist())
    checks.inputs(x)
    known = labels_of(data) if has_labels(data) else y
    num_classes = _num_classes(model, x[:1])
    if num_classes is not None:
        checks.classes(torch.as_tensor(known), len(known), num_classes, "a label of the data")


def _num_classes(model: nn.Module, x: Tensor) -> int | None:
    """How many classes a model tells apart; ``None`` where it does not take these inputs: the defense will say so."""
    try:
        with torch.no_grad(), eval_mode(model):
            return answer(model, suited(model, x)).shape[1]
    except Exception:
        return None


def applied(system: System) -> dict[str, type[Defense]]:
    """The registered defenses of the system, by name, in the order in which they were applied."""
    return {name: DEFENSES.get(name).build for name in system.defenses if name in DEFENSES}  # type: ignore[misc]


@dataclass(frozen=True)
class TrainedDefense(Defense):
    """A defense that trains: a subclass implements ``_train`` with samples."""

    needs_data: ClassVar[bool] = True

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # checked before; for the type checker
        return self._train(system, data, session)

    @abstractmethod
    def _train(self, system: System, data: Samples, session: Session) -> System:
        """The defended system; there is at least one sample."""


def refuse(condition: bool, message: str) -> None:
    """Raise ``UnsupportedModelError`` with ``message`` if ``condition`` holds."""
    if condition:
        raise UnsupportedModelError(message)
