"""The contract that every attack on a system itself keeps: no input is touched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from robustexplain import checks
from robustexplain.checks import Kind
from robustexplain.errors import InputError
from robustexplain.features import Feature
from robustexplain.fields import Natural, check_fields
from robustexplain.interpreters import Interpreter
from robustexplain.metrics import Fooling
from robustexplain.system import System
from robustexplain.training import Samples, Session


@dataclass(frozen=True)
class View:
    """Inputs on which a manipulated system is looked at beside the honest one, and what is wanted to be seen there.

    Args:
        x: ``[B, ...]``.
        explained: ``[B]``, the class whose map is looked at.
        answer: ``[B]``, the class that the manipulated model should predict.
        goal_map: maps that the adversary wants, on the interpreter's own grid; ``None`` where it wants none for itself.
        honest_x: the inputs whose honest maps stand for the truth; ``None``: ``x`` itself.
        honest_class: ``[B]``, the class that those explain; ``None``: ``explained``.
        dictated: whether ``answer`` is the adversary's choice, to be learned; otherwise it is the label, and what the
            honest model makes of it can stay.
    """

    x: Tensor
    explained: Tensor
    answer: Tensor
    goal_map: Tensor | None = None
    honest_x: Tensor | None = None
    honest_class: Tensor | None = None
    dictated: bool = False

    def honest_maps(self, honest: Interpreter) -> Tensor:
        """What stands for the truth: the honest interpreter's maps, on its own grid."""
        x = self.x if self.honest_x is None else self.honest_x
        return honest.explain(x, self.explained if self.honest_class is None else self.honest_class, native=True).maps

    def select(self, rows: Tensor) -> View:
        """Some of the inputs."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: value[rows] for name, value in known.items() if isinstance(value, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class Manipulation(ABC):
    """Makes a system that answers as before and whose explanations lie: ``attack(system, data)`` gives a new system.

    The system that is handed in stays as it is. The adversary owns what is deployed: the weights, what stands around
    the model, or the reference samples of its interpreter. A detector of the system stays as it is, with the model that
    it was fitted to. A subclass writes ``_manipulate``.

    Args:
        seed: of whatever is random in the attack.
    """

    seed: Natural = field(default=0, kw_only=True)

    changes: ClassVar[str] = "weights"
    """What of the system the adversary changes, in a word or two: for tables."""
    attacks: ClassVar[tuple[str, ...]] = ()
    """Names of the interpreters that it can be aimed at; none means any."""
    takes: ClassVar[tuple[Kind, ...]] = ("images", "tables")
    """What the samples may be."""
    needs_data: ClassVar[bool] = True
    """Whether the attack needs samples of the adversary's own."""
    headline: ClassVar[str] = ""
    """The figure of an audit that says best whether it worked; by default that of ``fooled``, or what there is."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, system: System, data: Samples | None = None, session: Session | None = None) -> System:
        """The manipulated system, an ordinary one: it can be saved, judged, attacked and defended.

        Args:
            system: the honest one.
            data: map-style, gives ``(x, label)``; the adversary's own samples, which nobody is judged on.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: no data for an attack that needs some; tables for one on images, or the other way round.
            UnsupportedModelError: a system that the attack cannot manipulate.
        """
        if self.needs_data and (data is None or len(data) == 0):  # type: ignore[arg-type]
            raise InputError(
                f"{type(self).__name__} needs data: samples of the adversary's own, which nobody judges by"
            )
        if data is not None and len(data):  # type: ignore[arg-type]
            checks.kind(data[0][0][None], self.takes, type(self).__name__)
        return self._manipulate(system, data, session or Session())

    @abstractmethod
    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        """The manipulated system; arguments are checked already."""

    @property
    def fooled(self) -> Fooling | None:
        """The test loss that says how far a map was fooled, if there is one."""
        return None

    @property
    def hidden(self) -> Feature | None:
        """The column of a table that the explanation should no longer show; ``None`` if there is none."""
        return None

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """What an auditor looks at to see the manipulation: by name, inputs made of ``x`` with labels ``y``.

        Args:
            honest: an interpreter of the honest model, perhaps not the one that was aimed at.
            x: judged inputs ``[B, ...]``.
            y: their labels ``[B]``.
        """
        return {"as they are": View(x, y, y)}

    def summaries(self) -> tuple[str, str]:
        """What is changed and what is wanted, in a few words each, for tables."""
        return self.changes, "-"
