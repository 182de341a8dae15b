"""Several interpreters speaking as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.interpreters import Explanation, Interpreter
from robustexplain.interpreters.base import explain_together
from robustexplain.registry import DEFENSES, INTERPRETERS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense


@INTERPRETERS.register("aggregate", paper="Rieger and Hansen 2020 (AGG-Mean)")
@dataclass(frozen=True, eq=False)
class Aggregate(Interpreter):
    """The mean of the members' maps, each rescaled on its own first, at the input's size.

    Args:
        members: interpreters of the same model.
        rescale: ``sum`` (each map's magnitudes sum to one, as AGG-Mean), ``minmax`` or ``absmax``.
    """

    members: tuple[Interpreter, ...] = ()
    rescale: ops.Rescale = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(self.members))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")
        if any(member.model is not self.model for member in self.members):
            raise InputError("every member of an aggregate must explain the same model")

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether every member is."""
        return all(member.differentiable for member in self.members)

    @property
    def is_gradient(self) -> bool:  # type: ignore[override]
        """Whether any member's map is a gradient."""
        return any(member.is_gradient for member in self.members)

    unit_range: ClassVar[bool] = False

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        maps, shared = explain_together(self.members, x, target, graph)
        full = [ops.resize(m, x.shape[-2:]) if x.dim() == 4 else m for m in maps]
        places = full[0][0].numel() if self.rescale == "sum" else 1
        scaled = [ops.rescale(m, self.rescale) * places for m in full]
        return shared._replace(maps=torch.stack(scaled).mean(0))


@DEFENSES.register("aggregated", paper="Rieger and Hansen 2020; Zhang et al. 2020, section 5 Q3 (ensemble)")
@dataclass(frozen=True)
class AggregatedInterpreter(Defense):
    """Replace the interpreter by the mean of several: an attack must move all of them at once.

    ``AggregatedInterpreter([Gradient, GradCAM])(system)``; the system's own interpreter is used for the member of its
    class, so that a trained one can be a member. Cost: the sum of the members'.

    Args:
        members: interpreter classes, or their registered names; each must need nothing but the model.
        rescale: what makes the members comparable before the mean.

    Examples:
        >>> import torch
        >>> import robustexplain as rx
        >>> from robustexplain import defenses, interpreters, models
        >>> model = models.load("small-cnn", num_classes=10, in_channels=1)
        >>> system = rx.System(model, interpreters.GradCAM(model))
        >>> hardened = defenses.AggregatedInterpreter([interpreters.Gradient, interpreters.GradCAM])(system)
        >>> [type(member).__name__ for member in hardened.interpreter.members]
        ['Gradient', 'GradCAM']
        >>> hardened(torch.rand(2, 1, 32, 32)).maps.shape
        torch.Size([2, 32, 32])
    """

    members: Sequence[type[Interpreter] | str] = ("gradient", "gradcam")
    rescale: ops.Rescale = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(self.members))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")
        for member in self.members:
            resolve(member)

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        members = tuple(member_of(system, resolve(member)) for member in self.members)
        return replace(system, interpreter=Aggregate(system.model, members, self.rescale))


def resolve(member: type[Interpreter] | str) -> type[Interpreter]:
    """The interpreter class of that name; a class is itself.

    Raises:
        UnknownNameError: with the nearest names.
        InputError: not a name or class of an interpreter.
    """
    cls = INTERPRETERS.get(member).build if isinstance(member, str) else member
    if not (isinstance(cls, type) and issubclass(cls, Interpreter)):
        raise InputError(f"expected an interpreter's class or name, got {member!r}")
    return cls


def member_of(system: System, cls: type[Interpreter]) -> Interpreter:
    """The system's own interpreter if it is of that class, else a new one of the system's model."""
    own = system.interpreter
    if type(own) is cls:
        return own
    entry = INTERPRETERS.get(INTERPRETERS.name_of(cls))
    if entry.train is not None:
        raise InputError(
            f"{entry.name!r} is trained: it can be a member only of a system whose interpreter it already is"
        )
    return cls(system.model)
