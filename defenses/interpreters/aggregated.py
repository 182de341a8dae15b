"""Aggregation of several interpreters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.interpreters import Aggregate, Composed, Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.base import innermost, wrapped_like
from robustexplain.registry import DEFENSES, INTERPRETERS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, applied, refuse


@DEFENSES.register("aggregated", paper="Rieger and Hansen 2020; Zhang et al. 2020, section 5 Q3 (ensemble)")
@dataclass(frozen=True)
class AggregatedInterpreter(Defense):
    """Replace the interpreter by the mean of several, so that an attack must change all of their maps at once.

    ``AggregatedInterpreter([Gradient, GradCAM])(system)``; the system's own interpreter is used for the member of its
    class, so that a trained one can be a member. Wrappers of the system's interpreter are put around every member: on a
    smoothed system all of them are smoothed. The cost is the sum of the members' costs.

    Args:
        members: interpreters by name, by class or with settings of their own (``{name: smoothgrad, samples: 20}``,
            :class:`InterpreterSpec`); each must need only the model.
        rescale: how maps are rescaled before the mean.

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

    layer = "interpreter"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        members = tuple(member_of(system, resolve(member)) for member in self.members)
        own = innermost(system.interpreter)
        if not any(innermost(member) is own for member in members):
            _refuse_hardened(system, own)
        return replace(system, interpreter=Aggregate(system.model, members, self.rescale))


def _refuse_hardened(system: System, own: Interpreter) -> None:
    """Refuse members that leave out an interpreter that a defense has hardened."""
    refuse(
        isinstance(own, Composed),
        f"the interpreter is made of several already ({type(own).__name__}), and the members leave it out: name all "
        "of them in one aggregate",
    )
    hardened = [name for name, cls in applied(system).items() if cls.layer == "interpreter" and not cls.wraps]
    entry = next((e.name for e in INTERPRETERS if e.build is type(own)), type(own).__name__)
    refuse(
        bool(hardened),
        f"{', '.join(map(repr, hardened))} hardened the interpreter, and the members of the aggregate leave it out: "
        f"name {entry!r} among them",
    )


def resolve(member: InterpreterSpec | type[Interpreter] | str) -> InterpreterSpec:
    """The interpreter that a name, a class or a spec stands for, as :meth:`InterpreterSpec.of`."""
    return InterpreterSpec.of(member)


def member_of(system: System, member: InterpreterSpec | type[Interpreter] | str) -> Interpreter:
    """The system's interpreter for a member of its class without settings, else a new one in the same wrappers.

    The class may be that of the system's interpreter or of the interpreter inside its wrappers.
    """
    own, member = system.interpreter, resolve(member)
    if member.entry.build in (type(own), type(innermost(own))) and not member.settings:
        return own
    if member.entry.train is not None:
        raise InputError(
            f"{member.name!r} is trained: it can be a member only of a system whose interpreter it already is"
        )
    return wrapped_like(own, member.build(system.model))
