"""Adaptation to a defense: settings that any attack of an adversary who knows the defense can use."""

from __future__ import annotations

from dataclasses import dataclass, replace

from robustexplain.autograd.rectifiers import Smooth
from robustexplain.errors import InputError
from robustexplain.fields import Count, NonNegative, check_fields
from robustexplain.objectives import Objective, Sum
from robustexplain.objectives.evasion import evade as evaded_by
from robustexplain.system import System
from robustexplain.system import draws as is_random

from .search.directions import BetaSchedule, GradientDirection

DRAWS = 10
"""Random draws over which an adaptive attack averages each direction; Xie et al. 2018 average over 30."""


@dataclass(frozen=True)
class Adaptation:
    """Three adaptations of an attack to a system's defenses; by default none is used.

    Args:
        evade: weight of the detector's score in the loss, with the constraint that it raises no alarm (see
            :func:`evasion`); 0 ignores the detector.
        draws: average each direction over this many random draws of the system and the threat model (expectation over
            transformation, Athalye et al. 2018b).
        straight: straight-through gradients for rounding (Athalye et al. 2018, BPDA).
    """

    evade: NonNegative = 0.0
    draws: Count = 1
    straight: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def words(self) -> str:
        """The adaptations in use, for tables."""
        words = ["detector in the loss"] if self.evade else []
        words += [f"mean of {self.draws} draws"] if self.draws > 1 else []
        return ", ".join(words + (["straight through rounding"] if self.straight else [])) or "nothing to adapt to"

    def to(self, system: System, *, evade: float = 1.0) -> Adaptation:
        """The adaptation to ``system``; settings other than the defaults are kept.

        Args:
            system: its detector is evaded, its randomness averaged over :func:`draws_for` draws, its rounding passed
                with straight-through gradients.
            evade: weight of a detector's score.
        """
        return replace(
            self,
            evade=self.evade or (0.0 if system.detector is None else evade),
            draws=draws_for(system) if self.draws == 1 else self.draws,
            straight=self.straight or system.rounds,
        )

    def direction(self, surrogate: Smooth | BetaSchedule | None = None) -> GradientDirection:
        """The gradient of the system or of a surrogate, with ``draws`` and ``straight`` as set."""
        return GradientDirection(surrogate, self.straight, self.draws)

    def evasion(self, system: System) -> Objective:
        """The detector's term of the loss; empty at a weight of 0."""
        return evasion(self.evade, system)


def draws_for(system: System) -> int:
    """Over how many draws of a system an adversary averages who does not know its seed; 1 where nothing is random.

    :data:`DRAWS`; fewer where a map, the model's answer or a detector's score is made of several draws itself, but
    never the deployed ones alone: two at least.
    """
    if not system.random:
        return 1
    own = [getattr(system.detector, "averaged", 1)] if is_random(system.detector) else []
    if is_random(system.model):
        # A model that answers by many draws averages them itself.
        own.append(max(getattr(part, "averaged", 1) for part in system.model.modules()))
    elif is_random(system.interpreter):
        own.append(system.interpreter.averaged)
    return max(2, -(-DRAWS // min(own, default=1)))


def evasion(weight: float, system: System) -> Objective:
    """The detector's term of a loss, with the constraint that it raises no alarm; empty at a weight of 0.

    It is the detector's own ``evasion``, or for one without that method a hinge on its soft score.

    Raises:
        InputError: a weight above 0 and a system without a detector.
    """
    if not weight:
        return Sum()
    if system.detector is None:
        raise InputError("evade > 0 needs a system with a detector")
    return evaded_by(system.detector, weight)
