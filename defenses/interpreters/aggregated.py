"""Aggregation of several interpreters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from robustexplain import maps as ops
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, Fraction, Positive
from robustexplain.interpreters import Aggregate, Composed, Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.aggregate import How, check_weights
from robustexplain.interpreters.composed.base import innermost, wrapped_like
from robustexplain.registry import DEFENSES, INTERPRETERS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, applied, refuse
from .calibration import clean_inputs, predictions
from .learned_weights import Goal, learned_weights

Weights = Literal["equal", "sensitivity", "complexity"] | tuple[float, ...]
"""Of the members: all the same, chosen to lower the aggregate's sensitivity or complexity, or given."""


@DEFENSES.register(
    "aggregated",
    paper="Rieger and Hansen 2020 (AGG-Mean, AGG-Var); Bhatt et al. 2020 (weights); "
    "Zhang et al. 2020, section 5 Q3 (ensemble)",
)
@dataclass(frozen=True)
class AggregatedInterpreter(Defense):
    """Replace the interpreter by one map of several, so that an attack must change all of their maps at once.

    ``AggregatedInterpreter([Gradient, GradCAM])(system)``; the system's own interpreter is used for the member of its
    class, so that a trained one can be a member. Wrappers of the system's interpreter are put around every member: on a
    smoothed system all of them are smoothed. The cost is the sum of the members' costs.

    Args:
        members: interpreters by name, by class or with settings of their own (``{name: smoothgrad, samples: 20}``,
            :class:`InterpreterSpec`); each must need only the model.
        rescale: how maps are rescaled before they are made one.
        how: ``mean`` (AGG-Mean), ``var`` (AGG-Var: the mean over the members' deviation) or ``rank`` (the mean of
            ranks, Borda's count), as :class:`robustexplain.interpreters.Aggregate`.
        weights: of the members: ``equal``, numbers that add up to one, or, of a mean, ``sensitivity`` or
            ``complexity``: chosen on the defense's samples to lower it. The least sensitive member alone is often best:
            ``least`` keeps the others in.
        floor: of ``var``: the constant beside the deviation, as a share of its mean.
        least: the weight of every member at least, where weights are chosen.
        images: how many of the defense's samples they are chosen on.
        batch_size: of them at once.

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
    how: How = "mean"
    weights: Weights = "equal"
    floor: Positive = 1.0
    least: Fraction = field(default=0.1, kw_only=True)
    images: Count = field(default=64, kw_only=True)
    batch_size: Count = field(default=32, kw_only=True)

    layer = "interpreter"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")
        self._check_weights()

    def _check_weights(self) -> None:
        """Refuse weights that are none, and what cannot be chosen."""
        if not isinstance(self.weights, str):
            object.__setattr__(self, "weights", tuple(self.weights))
            check_weights(self, tuple(self.weights), len(self.members))
            return
        if self.weights not in ("equal", "sensitivity", "complexity"):
            words = "'equal', 'sensitivity', 'complexity' or a number for each member"
            raise FieldError(type(self).__name__, "weights", f"must be {words}, got {self.weights!r}")
        if self.needs_data and self.how != "mean":
            raise FieldError(type(self).__name__, "weights", f"are chosen for a mean only, and how is {self.how!r}")
        if self.needs_data and self.least * len(self.members) > 1:
            most = 1 / len(self.members)
            raise FieldError(type(self).__name__, "least", f"must be at most {most:.3g} here, got {self.least!r}")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether weights are chosen on samples."""
        return self.weights in ("sensitivity", "complexity")

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        members = tuple(member_of(system, resolve(member)) for member in self.members)
        own = innermost(system.interpreter)
        if not any(innermost(member) is own for member in members):
            _refuse_hardened(system, own)
        given = self.weights if isinstance(self.weights, tuple) else ()
        aggregate = Aggregate(system.model, members, self.rescale, self.how, given, self.floor)
        if self.needs_data:
            aggregate = self._weighted(aggregate, system, data, session)
        return replace(system, interpreter=aggregate)

    def _weighted(self, aggregate: Aggregate, system: System, data: Samples | None, session: Session) -> Aggregate:
        """The aggregate with weights that are chosen on the samples."""
        goal: Goal = "complexity" if self.weights == "complexity" else "sensitivity"
        x = clean_inputs(system, data, self.images, self.seed)
        classes = predictions(system.model, x, self.batch_size)
        weights, before, after = learned_weights(aggregate, x, classes, goal, self.least, self.batch_size, self.seed)
        shares = ", ".join(f"{member} {weight:.3f}" for member, weight in zip(self.members, weights, strict=True))
        session.progress.say(f"aggregated: weights {shares}; {goal} {before:.4g} -> {after:.4g} on {len(x)} inputs")
        return replace(aggregate, weights=weights)


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
