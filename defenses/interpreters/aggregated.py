"""Several interpreters speaking as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.interpreters import Explanation, Interpreter, InterpreterSpec
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
        members: interpreters by name, by class or with settings of their own (``{name: smoothgrad, samples: 20}``,
            :class:`InterpreterSpec`); each must need nothing but the model.
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

    members: Sequence[InterpreterSpec | type[Interpreter] | str] = ("gradient", "gradcam")
    rescale: ops.Rescale = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        members = tuple(member_of(system, resolve(member)) for member in self.members)
        return replace(system, interpreter=Aggregate(system.model, members, self.rescale))


def resolve(member: InterpreterSpec | type[Interpreter] | str) -> InterpreterSpec:
    """The interpreter that a name, a class or a spec stands for, as :meth:`InterpreterSpec.of`."""
    return InterpreterSpec.of(member)


def member_of(system: System, member: InterpreterSpec | type[Interpreter] | str) -> Interpreter:
    """The system's own interpreter for a member of its class without settings, else a new one of the system's model."""
    own, member = system.interpreter, resolve(member)
    if type(own) is member.entry.build and not member.settings:
        return own
    if member.entry.train is not None:
        raise InputError(
            f"{member.name!r} is trained: it can be a member only of a system whose interpreter it already is"
        )
    return member.build(system.model)
