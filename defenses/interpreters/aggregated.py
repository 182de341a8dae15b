"""Several interpreters speaking as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.interpreters import Aggregate, Composed, Interpreter
from robustexplain.interpreters.composed.base import innermost, wrapped_like
from robustexplain.registry import DEFENSES, INTERPRETERS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, applied, refuse


@DEFENSES.register("aggregated", paper="Rieger and Hansen 2020; Zhang et al. 2020, section 5 Q3 (ensemble)")
@dataclass(frozen=True)
class AggregatedInterpreter(Defense):
    """Replace the interpreter by the mean of several: an attack must move all of them at once.

    ``AggregatedInterpreter([Gradient, GradCAM])(system)``; the system's own interpreter is used for the member of its
    class, so that a trained one can be a member. Members stand inside the wrappers that the system's own stands in: on
    a smoothed system all of them are smoothed. Cost: the sum of the members'.

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

    layer = "interpreter"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(self.members))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")
        for member in self.members:
            resolve(member)

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        members = tuple(member_of(system, resolve(member)) for member in self.members)
        own = innermost(system.interpreter)
        if not any(innermost(member) is own for member in members):
            _refuse_hardened(system, own)
        return replace(system, interpreter=Aggregate(system.model, members, self.rescale))


def _refuse_hardened(system: System, own: Interpreter) -> None:
    """Refuse to leave out an interpreter that a defense made what it is."""
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
    """The system's own interpreter if it is of that class, or else a new one, inside the system's own wrappers.

    ``cls`` may be the class of the system's interpreter or of what stands inside its wrappers (a trained one, say).
    """
    own = system.interpreter
    if cls in (type(own), type(innermost(own))):
        return own
    entry = INTERPRETERS.get(INTERPRETERS.name_of(cls))
    if entry.train is not None:
        raise InputError(
            f"{entry.name!r} is trained: it can be a member only of a system whose interpreter it already is"
        )
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if needed != ["model"]:
        raise InputError(f"{entry.name!r} needs more than a model ({', '.join(needed[1:])}): it cannot be a member")
    return wrapped_like(own, cls(system.model))
