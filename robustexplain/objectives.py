"""What an adversary (or a defense) wants of logits and maps: one loss per sample, and whether it is met.

Objectives add up with weights: ``Misclassify() + 20.0 * MatchMap()``. The same ones serve whether the variable is the
input, a flow, a patch or the model's weights.

Every loss is a sum over nothing but its own definition: per sample, *mean* over the pixels of a map, so that a weight
can be carried to another map size. (Papers that sum over a ``7 x 7`` map have weights smaller by 49.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from . import maps as ops
from .errors import InputError
from .fields import Fraction, NonNegative, check_fields
from .registry import OBJECTIVES
from .streams import Streams


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
    """What stays fixed for each sample while a search runs.

    Args:
        x: the benign inputs ``[B, ...]``.
        label: ``[B]``, the class to leave (or to keep).
        goal_class: ``[B]``, what the adversary wants predicted; ``None``: anything but ``label``.
        goal_map: ``[B, h, w]``, the map it wants seen, on the interpreter's own grid.
    """

    x: Tensor
    label: Tensor
    goal_class: Tensor | None = None
    goal_map: Tensor | None = None

    def select(self, rows: Tensor) -> Goal:
        """The goals of some samples."""
        return Goal(*(None if v is None else v[rows] for v in (self.x, self.label, self.goal_class, self.goal_map)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Seen:
    """What the adversary sees of the current inputs; what no objective asked for is ``None``."""

    x: Tensor
    logits: Tensor
    maps: Tensor | None = None
    encoder_logits: Tensor | None = None
    score: Tensor | None = None
    progress: float = 0.0
    streams: Streams | None = None

    def at(self, progress: float) -> Seen:
        """The same at another moment of the search."""
        return replace(self, progress=progress)


@dataclass(frozen=True)
class Objective(ABC):
    """A loss per sample, and when it is met.

    A *constraint* (``constraint = True``) is a condition that the returned iterate should meet; among those that meet
    all of them, the one with the lowest remaining loss is the best.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    constraint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """``[B]``, to be minimised."""

    def met(self, seen: Seen, goal: Goal) -> Tensor:
        """``[B]`` bool; an objective that has no threshold of its own is never met."""
        return torch.zeros(len(seen.logits), dtype=torch.bool, device=seen.logits.device)

    def unmet(self, seen: Seen, goal: Goal) -> Tensor:
        """``[B]``: how far a constraint is from being met, in whole steps; 0 is met."""
        return (~self.met(seen, goal)).float()

    def terms(self) -> tuple[tuple[Weight, Objective], ...]:
        """The weighted parts of this objective: itself, if it is not a sum."""
        return ((1.0, self),)

    def __add__(self, other: Objective) -> Objective:
        return Sum(self.terms() + other.terms())

    def __rmul__(self, weight: Weight) -> Objective:
        return Sum(tuple((_product(weight, own), part) for own, part in self.terms()))


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum; its needs are those of its parts, and it is met where all its constraints are."""

    parts: tuple[tuple[Weight, Objective], ...] = ()

    def terms(self) -> tuple[tuple[Weight, Objective], ...]:
        """The weighted parts."""
        return self.parts

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """The weighted sum of the parts' losses, ``[B]``."""
        return sum_losses(self.parts, seen, goal)

    def met(self, seen: Seen, goal: Goal) -> Tensor:
        """Where every constraint is met; nowhere if there is none."""
        met = [part.met(seen, goal) for _, part in self.parts if part.constraint]
        return torch.stack(met).all(0) if met else super().met(seen, goal)


def sum_losses(parts: tuple[tuple[Weight, Objective], ...], seen: Seen, goal: Goal) -> Tensor:
    """``sum_i weight_i(progress) loss_i``, ``[B]``; zeros if there are no parts."""
    total = seen.logits.new_zeros(len(seen.logits))
    for weight, part in parts:
        total = total + at(weight, seen.progress) * part.loss(seen, goal)
    return total


def needs_of(objective: Objective) -> frozenset[str]:
    """What any part of the objective must see: ``maps``, ``score``."""
    return frozenset().union(*(part.needs for _, part in objective.terms()))


@OBJECTIVES.register("misclassify", paper="Madry et al. 2018; Zhang et al. 2020, section 3.6 (label smoothing)")
@dataclass(frozen=True)
class Misclassify(Objective):
    """Cross-entropy towards ``goal_class`` (targeted), or away from ``label`` (untargeted).

    Args:
        confidence: met only where the goal's probability (untargeted: one minus the label's) reaches this.
        smoothing: ``rho``: the goal's target probability is drawn from ``U(1 - rho, 1)`` at each step (Zhang et al.,
            section 3.6), which keeps the gradient alive on over-confident predictions; may be a schedule.
    """

    confidence: Fraction = 0.0
    smoothing: Weight = 0.0

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """Cross-entropy, nats."""
        log_p = seen.logits.log_softmax(1)
        if goal.goal_class is None:
            return log_p.gather(1, goal.label[:, None])[:, 0]
        toward = log_p.gather(1, goal.goal_class[:, None])[:, 0]
        rho = at(self.smoothing, seen.progress)
        if rho == 0 or seen.streams is None:
            return -toward
        wanted = 1 - rho * seen.streams.uniform(toward)
        rest = (log_p.sum(1) - toward) / (log_p.shape[1] - 1)
        return -(wanted * toward + (1 - wanted) * rest)

    def met(self, seen: Seen, goal: Goal) -> Tensor:
        """Predicted as wanted, with at least ``confidence``."""
        return self.unmet(seen, goal) == 0

    def unmet(self, seen: Seen, goal: Goal) -> Tensor:
        """0 where met, 1 where predicted as wanted below ``confidence``, 2 where predicted otherwise."""
        p, prediction = seen.logits.softmax(1), seen.logits.argmax(1)
        if goal.goal_class is None:
            wanted, sure = prediction != goal.label, 1 - p.gather(1, goal.label[:, None])[:, 0]
        else:
            wanted, sure = prediction == goal.goal_class, p.gather(1, goal.goal_class[:, None])[:, 0]
        return torch.where(wanted, (sure < self.confidence).float(), 2.0)


@OBJECTIVES.register("match-map", paper="Zhang et al. 2020, eq. 3", needs=("gradients",))
@dataclass(frozen=True)
class MatchMap(Objective):
    """Mean squared difference between the rescaled map and the rescaled goal map, on the interpreter's own grid.

    Args:
        rescale: applied to both maps; ``minmax`` (Zhang et al. for CAM and GRAD), ``none`` (RTS), ``sum`` (Dombrowski).
        pool: average-pool both maps by this factor first (Zhang et al. compare GRAD maps after 4 x 4).
    """

    rescale: ops.Rescale = "minmax"
    pool: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """Mean over pixels of the squared difference."""
        if goal.goal_map is None or seen.maps is None:
            raise InputError("MatchMap needs a goal map and maps that were seen")
        now, wanted = (ops.rescale(ops.pool(m, self.pool), self.rescale) for m in (seen.maps, goal.goal_map))
        return (now - wanted).square().flatten(1).mean(1)


@OBJECTIVES.register("agree-encoder", paper="Zhang et al. 2020, section 3.4 (l_enc)")
@dataclass(frozen=True)
class AgreeEncoder(Objective):
    """Cross-entropy of a model-guided interpreter's own encoder towards ``goal_class``.

    Without it the encoder's class selector still sees the true class.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """Cross-entropy, nats; zero for an interpreter without an encoder."""
        if seen.encoder_logits is None or goal.goal_class is None:
            return seen.logits.new_zeros(len(seen.logits))
        return -seen.encoder_logits.log_softmax(1).gather(1, goal.goal_class[:, None])[:, 0]


@OBJECTIVES.register("evade-detector", paper="Carlini and Wagner 2017 (adaptive attacks)", needs=("detector",))
@dataclass(frozen=True)
class EvadeDetector(Objective):
    """Hinge on the detector's differentiable score: zero once it is ``margin`` below ``threshold``.

    Args:
        threshold: the soft score that clean inputs exceed as rarely as the detector's false-alarm rate allows.
        margin: how far below to go.
    """

    threshold: float = 0.0
    margin: NonNegative = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"score"})

    def loss(self, seen: Seen, goal: Goal) -> Tensor:
        """``max(score - threshold + margin, 0)``."""
        if seen.score is None:
            raise InputError("EvadeDetector needs a system with a detector")
        return (seen.score - self.threshold + self.margin).clamp(min=0)

    def met(self, seen: Seen, goal: Goal) -> Tensor:
        """The score is below the threshold."""
        if seen.score is None:
            raise InputError("EvadeDetector needs a system with a detector")
        return seen.score < self.threshold
