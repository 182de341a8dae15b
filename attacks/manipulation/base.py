"""The contract that every attack on a system itself keeps: no input is touched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from robustexplain.errors import InputError
from robustexplain.fields import Natural, check_fields
from robustexplain.system import System
from robustexplain.training import Samples, Session


@dataclass(frozen=True)
class ModelAttack(ABC):
    """Makes a system that answers as before and whose explanations lie: ``attack(system, data)`` gives a new system.

    The system that is handed in stays as it is. The adversary owns what is deployed: the weights, what stands around
    the model, or the reference samples of its interpreter. A subclass writes ``_manipulate``.

    Args:
        seed: of whatever is random in the attack.
    """

    seed: Natural = field(default=0, kw_only=True)

    changes: ClassVar[str] = "weights"
    """What of the system the adversary changes, in a word or two: for tables."""
    attacks: ClassVar[tuple[str, ...]] = ()
    """Names of the interpreters that it can be aimed at; none means any."""
    needs_data: ClassVar[bool] = True
    """Whether the attack needs samples of the adversary's own."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, system: System, data: Samples | None = None, session: Session | None = None) -> System:
        """The manipulated system, an ordinary one: it can be saved, judged, attacked and defended.

        Args:
            system: the honest one.
            data: map-style, gives ``(x, label)``; the adversary's own samples, which nobody is judged on.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: no data for an attack that needs some.
            UnsupportedModelError: a system that the attack cannot manipulate.
        """
        if self.needs_data and (data is None or len(data) == 0):  # type: ignore[arg-type]
            raise InputError(
                f"{type(self).__name__} needs data: samples of the adversary's own, which nobody judges by"
            )
        return self._manipulate(system, data, session or Session())

    @abstractmethod
    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        """The manipulated system; arguments are checked already."""

    def words(self) -> tuple[str, str]:
        """What is changed and what is wanted, in a few words each, for tables."""
        return self.changes, "-"
