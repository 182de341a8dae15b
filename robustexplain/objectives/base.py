"""The contract of objectives: goals (fixed), observations (of each step), losses that add up, and schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..fields import check_fields
from ..random_streams import Streams

if TYPE_CHECKING:
    from ..system import System


class Schedule(Protocol):
    """A number that changes with progress in ``[0, 1]``."""

    def __call__(self, progress: float) -> float:
        """The value at ``progress``."""
        ...


@dataclass(frozen=True)
class Ramp:
    """Linear from ``start`` to ``end``."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in ``[0, 1]``."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Decay:
    """Geometric from ``start`` to ``end``, both above zero."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in ``[0, 1]``."""
        return self.start * (self.end / self.start) ** progress if self.start else 0.0


Weight = float | Schedule


def at(weight: Weight, progress: float) -> float:
    """The value of a number or a schedule at ``progress``."""
    return weight(progress) if callable(weight) else float(weight)


@dataclass(frozen=True)
class Product:
    """The product of two weights, of which at least one is a schedule."""

    first: Weight
    second: Weight

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in ``[0, 1]``."""
        return at(self.first, progress) * at(self.second, progress)


def _product(first: Weight, second: Weight) -> Weight:
    return Product(first, second) if callable(first) or callable(second) else first * second


@dataclass(frozen=True)
class Goal:
    """What is fixed for each sample during a search.

    Args:
        x: the benign inputs ``[B, ...]``.
        label: ``[B]``, the class to leave (or to keep).
        goal_class: ``[B]``, the class that the adversary wants predicted; ``None``: any other than ``label``.
        goal_map: ``[B, h, w]``, the map that it wants, on the interpreter's own grid.
        explained: ``[B]``, the class whose map the search uses; ``None``: ``goal_class``, or the prediction.
        benign_map: ``[B, h, w]``, the map of ``x`` itself, for objectives that move away from it.
        benign_logits: ``[B, K]`` of ``x`` itself, for objectives that keep the prediction.
        trade: ``[B]``, a constant that a search over constants (Carlini and Wagner) sets for each sample.
        wanted: ``[B, K]``, the probabilities that the adversary wants, if it wants more than a class.
        scale: ``[B]``, factors on the logits in losses, for networks whose logits are tiny or huge; ``None``: 1.
    """

    x: Tensor
    label: Tensor
    goal_class: Tensor | None = None
    goal_map: Tensor | None = None
    explained: Tensor | None = None
    benign_map: Tensor | None = None
    benign_logits: Tensor | None = None
    trade: Tensor | None = None
    wanted: Tensor | None = None
    scale: Tensor | None = None

    def scaled(self, logits: Tensor) -> Tensor:
        """Logits ``[B, K]`` times the scale of each sample."""
        return logits if self.scale is None else logits * self.scale[:, None]

    def select(self, rows: Tensor) -> Goal:
        """The goals of some samples."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[rows] for name, value in known.items() if value is not None})

    @property
    def target(self) -> Tensor | None:
        """``[B]``, the class whose map is used; ``None`` is the current prediction."""
        return self.goal_class if self.explained is None else self.explained


@dataclass(frozen=True)
class Observation:
    """The system's outputs for the current inputs of a search; those that no objective needs are ``None``.

    Args:
        x: the inputs ``[B, ...]``.
        logits: ``[B, K]``.
        maps: ``[B, h, w]``, on the interpreter's own grid.
        encoder_logits: ``[B, K]`` of a model-guided interpreter's own network.
        score: ``[B]``, the detector's soft score.
        variable: the threat model's variable that gives ``x`` (a flow, a patch); for norm balls ``x`` itself.
        system: for objectives that evaluate it on further inputs (squeezed ones).
        progress: of the search, in ``[0, 1]``.
        streams: one random stream a sample.
        region: ``[B, H, W]``, 1 where the threat model may change ``x`` (a patch); ``None``: anywhere.
        noted: a cache of what objectives computed from this observation (outputs for squeezed inputs, losses that are
            needed twice).
    """

    x: Tensor
    logits: Tensor
    maps: Tensor | None = None
    encoder_logits: Tensor | None = None
    score: Tensor | None = None
    variable: Tensor | None = None
    system: System | None = None
    progress: float = 0.0
    streams: Streams | None = None
    region: Tensor | None = None
    noted: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def at(self, progress: float) -> Observation:
        """The same observation at another progress of the search."""
        return replace(self, progress=progress)


@dataclass(frozen=True)
class Objective(ABC):
    """A loss per sample, and the condition under which it is met.

    A *constraint* (``constraint = True``) is a condition that the returned iterate should meet; among those that meet
    all of them, the one with the lowest remaining loss is the best.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    constraint: ClassVar[bool] = True
    least: ClassVar[float] = 0.0
    """The smallest possible loss; ``-inf`` where there is none."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``[B]``, to be minimised."""

    @property
    def settled(self) -> bool:
        """Whether the loss depends on observation and goal alone, not on progress or draws: it is then cached."""
        return False

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """``[B]`` bool; an objective without a threshold is never met."""
        return torch.zeros(len(seen.logits), dtype=torch.bool, device=seen.logits.device)

    def unmet(self, seen: Observation, goal: Goal) -> Tensor:
        """``[B]``: how far a constraint is from being met, in whole steps; 0 is met."""
        return (~self.met(seen, goal)).float()

    def terms(self) -> tuple[tuple[Weight, Objective], ...]:
        """The weighted parts of this objective: itself, if it is not a sum."""
        return ((1.0, self),)

    def __add__(self, other: Objective) -> Objective:
        return Sum(self.terms() + other.terms())

    def __rmul__(self, weight: Weight) -> Objective:
        return Sum(tuple((_product(weight, inner), part) for inner, part in self.terms()))


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum; its needs are those of its parts, and it is met where all its constraints are."""

    parts: tuple[tuple[Weight, Objective], ...] = ()

    def terms(self) -> tuple[tuple[Weight, Objective], ...]:
        """The weighted parts."""
        return self.parts

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """The weighted sum of the parts' losses, ``[B]``."""
        return sum_losses(self.parts, seen, goal)

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """Where every constraint is met; nowhere if there is none."""
        met = [part.met(seen, goal) for _, part in self.parts if part.constraint]
        return torch.stack(met).all(0) if met else super().met(seen, goal)


def sum_losses(parts: tuple[tuple[Weight, Objective], ...], seen: Observation, goal: Goal) -> Tensor:
    """``sum_i weight_i(progress) loss_i``, ``[B]``; zeros if there are no parts."""
    weighted = [(at(weight, seen.progress), _noted_loss(part, seen, goal)) for weight, part in parts]
    losses = [loss if weight == 1 else weight * loss for weight, loss in weighted]
    return sum(losses[1:], losses[0]) if losses else seen.logits.new_zeros(len(seen.logits))


def _noted_loss(part: Objective, seen: Observation, goal: Goal) -> Tensor:
    """A part's loss; computed once an observation if it is settled."""
    if not part.settled:
        return part.loss(seen, goal)
    # Part and goal are stored too: being kept alive, their ids are not reused.
    known: tuple[Objective, Goal, Tensor] | None = seen.noted.get(id(part))
    fresh = known is None or known[0] is not part or known[1] is not goal
    if known is None or fresh or (torch.is_grad_enabled() and not known[2].requires_grad):
        known = seen.noted[id(part)] = (part, goal, part.loss(seen, goal))
    return known[2]


def needs_of(objective: Objective) -> frozenset[str]:
    """What any part of the objective needs in an observation: ``maps``, ``score``."""
    return frozenset().union(*(part.needs for _, part in objective.terms()))
