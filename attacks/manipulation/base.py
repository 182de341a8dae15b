"""Base class of the attacks that change a system itself, not its inputs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustexplain import checks
from robustexplain.autograd.second_derivatives import named_derivatives
from robustexplain.checks import Kind
from robustexplain.errors import InputError
from robustexplain.features import Feature
from robustexplain.fields import Natural, check_fields
from robustexplain.interpreters import Interpreter
from robustexplain.metrics import Fooling
from robustexplain.system import System
from robustexplain.training import Samples, Session
from robustexplain.training.modes import left_alone


@dataclass(frozen=True)
class View:
    """Inputs on which manipulated and honest system are compared, with the adversary's targets there.

    Args:
        x: ``[B, ...]``.
        explained: ``[B]``, the class whose map is compared.
        answer: ``[B]``, the class that the manipulated model should predict.
        goal_map: maps that the adversary wants, on the interpreter's own grid; ``None`` if there is no such map.
        honest_x: the inputs whose honest maps are the reference; ``None``: ``x`` itself.
        honest_class: ``[B]``, the class that those maps explain; ``None``: ``explained``.
        new_answer: whether ``answer`` is the adversary's choice, to be learned. Otherwise it is the label, and a
            different prediction of the honest model may stay.
    """

    x: Tensor
    explained: Tensor
    answer: Tensor
    goal_map: Tensor | None = None
    honest_x: Tensor | None = None
    honest_class: Tensor | None = None
    new_answer: bool = False

    def honest_maps(self, honest: Interpreter) -> Tensor:
        """The reference: the honest interpreter's maps, on its own grid."""
        x = self.x if self.honest_x is None else self.honest_x
        return honest.explain(x, self.explained if self.honest_class is None else self.honest_class, native=True).maps

    def select(self, rows: Tensor) -> View:
        """The view of the inputs at ``rows``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **chosen)


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model's weights are; ``None`` for one without any."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def on_device(interpreter: Interpreter, device: torch.device) -> Interpreter:
    """The interpreter with its model on ``device``: a copy, if it is on another one."""
    if device_of(interpreter.model) in (None, device):
        return interpreter
    moved = copy.deepcopy(interpreter)
    moved.model.to(device)
    return moved


@dataclass(frozen=True)
class Manipulation(ABC):
    """Attack on a system itself: ``attack(system, data)`` gives a new system whose explanations mislead.

    The predictions stay as they are wherever the attack does not change them on purpose. The given system is not
    changed. The adversary controls what is deployed: the weights, a wrapper around the model, or the reference samples
    of its interpreter. A detector of the system stays as it is, with the model that it was fitted to. A subclass
    implements ``_manipulate``.

    Args:
        seed: of everything random in the attack.
    """

    seed: Natural = field(default=0, kw_only=True)

    changes: ClassVar[str] = "weights"
    """The part of the system that the attack changes, in a word or two, for tables."""
    attacks: ClassVar[tuple[str, ...]] = ()
    """Registered names of the interpreters that it can attack; empty means any."""
    takes: ClassVar[tuple[Kind, ...]] = ("images", "tables")
    """Kinds of samples that it takes."""
    needs_data: ClassVar[bool] = True
    """Whether the attack needs samples of the adversary."""
    headline: ClassVar[str] = ""
    """The audit's main figure for this attack; empty: that of ``fooled``, or the first one there is."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, system: System, data: Samples | None = None, session: Session | None = None) -> System:
        """The manipulated system, an ordinary one: it can be saved, judged, attacked and defended.

        Args:
            system: the honest one.
            data: the adversary's samples, map-style, gives ``(x, label)``; none of them is used in the evaluation.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: no data for an attack that needs some; tables for an attack on images, or the other way round.
            UnsupportedModelError: a system that the attack cannot manipulate.
        """
        if self.needs_data and (data is None or len(data) == 0):
            raise InputError(
                f"{type(self).__name__} needs data: samples of the adversary, which the evaluation does not use"
            )
        if data is not None and len(data):
            checks.kind(data[0][0][None], self.takes, type(self).__name__)
        with named_derivatives(), left_alone(system.model, self):
            return self._manipulate(system, data, session or Session())

    @abstractmethod
    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        """The manipulated system; the arguments have been checked."""

    @property
    def fooled(self) -> Fooling | None:
        """The test loss that measures how far a map was fooled; ``None`` if the paper has none."""
        return None

    @property
    def hidden(self) -> Feature | None:
        """The table column that explanations should no longer show: ``sensitive``; ``None`` where there is none."""
        return getattr(self, "sensitive", None)

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The inputs on which an audit measures the manipulation, by name, made from ``x`` and labels ``y``.

        Args:
            honest: an interpreter of the honest model, which may be another than the attacked one.
            x: test inputs ``[B, ...]``.
            y: their labels ``[B]``.
        """
        return {"as they are": View(x, y, y)}

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at, in a few words each, for tables."""
        return self.changes, "-"
