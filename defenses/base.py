"""The contract that every defense keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.fields import Natural, check_fields
from robustexplain.registry import DEFENSES
from robustexplain.system import System, on_model
from robustexplain.training import Samples, Session

Layer = Literal["model", "input", "interpreter", "detector"]
"""What of a system a defense changes, from the ground up: one stands on what is below it."""
LAYERS: tuple[Layer, ...] = get_args(Layer)
_DOES = dict(
    zip(
        LAYERS, ("hardens the model", "transforms the input", "hardens the interpreter", "adds a detector"), strict=True
    )
)


@dataclass(frozen=True)
class Defense(ABC):
    """Makes a system harder to deceive: ``defense(system, data=None, session=None)`` gives a new system.

    The system that is handed in stays as it is. A subclass writes ``_defend``.

    Args:
        seed: of whatever is random in the defense.
    """

    seed: Natural = field(default=0, kw_only=True)

    layer: ClassVar[Layer]
    """What of the system it changes."""
    wraps: ClassVar[bool] = False
    """Whether what it does to the interpreter is a wrapper, which can be put around any other interpreter as well."""
    defends: ClassVar[tuple[str, ...]] = ()
    """Names of the interpreters that it can defend; none means any."""
    needs_data: ClassVar[bool] = False
    """Whether the defense trains, and so needs samples."""
    part: ClassVar[Literal["train", "defense"]] = "defense"
    """Which part of the data those samples are: the model's own, or what is kept for defenses."""

    def __post_init__(self) -> None:
        check_fields(self)
        if getattr(type(self), "layer", None) not in LAYERS:
            raise InputError(f"{type(self).__name__}.layer must say what it changes: one of {', '.join(LAYERS)}")

    @property
    def name(self) -> str:
        """Its registered name; one that is not registered goes by its class."""
        cls = type(self)
        return next((entry.name for entry in DEFENSES if entry.build is cls), cls.__name__)

    def __call__(self, system: System, data: Samples | None = None, session: Session | None = None) -> System:
        """The defended system.

        Args:
            system: what is deployed.
            data: map-style, gives ``(x, label)``; the defense's own samples, which nobody is judged on.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: no data for a defense that trains.
            UnsupportedModelError: a system that the defense cannot cover, or that has a defense already which this one
                would undo.
        """
        if self.needs_data and (data is None or len(data) == 0):
            raise InputError(f"{type(self).__name__} trains, and needs data: samples that nobody is judged on")
        self._in_order(system)
        return replace(self._defend(system, data, session or Session()), defenses=(*system.defenses, self.name))

    @abstractmethod
    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        """The defended system; arguments are checked already."""

    def _in_order(self, system: System) -> None:
        """Refuse a system that has a defense of a higher layer: its detector or map was made for what is below."""
        for name, cls in applied(system).items():
            refuse(
                LAYERS.index(self.layer) < LAYERS.index(cls.layer),
                f"defenses stack in the order {', '.join(LAYERS)}; {self.name!r} {_DOES[self.layer]} and the system "
                f"has {name!r} already: apply {self.name} first",
            )

    def oblivious_view(self, defended: System, root: System) -> System:
        """The system as an attacker takes it who knows of no defense: the deployed classifier, explained as at first.

        Of a stack, take the views one after the other, from the defense that was applied last to the first: each
        leaves out what it added.

        Args:
            defended: what is deployed.
            root: the undefended system that the first defense was applied to.
        """
        if defended.model is root.model:
            return root.without_detector()
        return System(defended.model, on_model(root.interpreter, defended.model))


def applied(system: System) -> dict[str, type[Defense]]:
    """The registered defenses that made the system, by name, in order."""
    return {name: DEFENSES.get(name).build for name in system.defenses if name in DEFENSES}  # type: ignore[misc]


@dataclass(frozen=True)
class TrainedDefense(Defense):
    """A defense that trains: a subclass writes ``_train``, which is given samples."""

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
