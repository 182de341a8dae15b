"""The contract that every defense keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.fields import Natural, check_fields
from robustexplain.system import System
from robustexplain.training import Samples, Session


@dataclass(frozen=True)
class Defense(ABC):
    """Makes a system harder to deceive: ``defense(system, data=None, session=None)`` gives a new system.

    The system that is handed in stays as it is. A subclass writes ``_defend``.

    Args:
        seed: of whatever is random in the defense.
    """

    seed: Natural = field(default=0, kw_only=True)

    defends: ClassVar[tuple[str, ...]] = ()
    """Names of the interpreters that it can defend; none means any."""
    needs_data: ClassVar[bool] = False
    """Whether the defense trains, and so needs samples."""
    part: ClassVar[Literal["train", "defense"]] = "defense"
    """Which part of the data those samples are: the model's own, or what is kept for defenses."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, system: System, data: Samples | None = None, session: Session | None = None) -> System:
        """The defended system.

        Args:
            system: what is deployed.
            data: map-style, gives ``(x, label)``; the defense's own samples, which nobody is judged on.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: no data for a defense that trains.
            UnsupportedModelError: a system that the defense cannot cover.
        """
        if self.needs_data and (data is None or len(data) == 0):
            raise InputError(f"{type(self).__name__} trains, and needs data: samples that nobody is judged on")
        return self._defend(system, data, session or Session())

    @abstractmethod
    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        """The defended system; arguments are checked already."""

    @staticmethod
    def plain_view(defended: System, base: System) -> System:
        """The system as an attacker takes it who does not know of the defense: its classifier, explained as before.

        Args:
            defended: what is deployed.
            base: the system before the defense.
        """
        if defended.model is base.model:
            return base.without_detector()
        return System(defended.model, replace(base.interpreter, model=defended.model))


@dataclass(frozen=True)
class TrainedDefense(Defense):
    """A defense that trains: a subclass writes ``_train``, which is given samples."""

    needs_data: ClassVar[bool] = True

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # refused at the door; for the type checker
        return self._train(system, data, session)

    @abstractmethod
    def _train(self, system: System, data: Samples, session: Session) -> System:
        """The defended system; there is at least one sample."""


def refuse(condition: bool, message: str) -> None:
    """Raise ``UnsupportedModelError`` with ``message`` if ``condition`` holds."""
    if condition:
        raise UnsupportedModelError(message)
