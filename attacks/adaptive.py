"""What an adversary who knows the defense does about it, whatever the attack."""

from __future__ import annotations

from dataclasses import dataclass, replace

from robustexplain.autograd.rectifiers import Smooth
from robustexplain.errors import InputError
from robustexplain.fields import Count, NonNegative, check_fields
from robustexplain.objectives import Objective, Sum
from robustexplain.objectives.evasion import evade as evaded_by
from robustexplain.system import System

from .search.directions import BetaSchedule, GradientDirection

DRAWS = 10
"""Draws over which an adaptive adversary averages each direction; Xie et al. 2018 average their defense over 30."""


@dataclass(frozen=True)
class Adaptation:
    """Three things that an adversary who knows a system can do about its defenses; by default none of them.

    Args:
        evade: weight of the detector's score in the loss, with its silence as a condition (see :func:`evasion`); 0
            ignores the detector.
        draws: average each direction over so many draws of what is random in the system or the threat model
            (expectation over transformation, Athalye et al. 2018b).
        straight: go straight through rounding (Athalye et al. 2018, BPDA).
    """

    evade: NonNegative = 0.0
    draws: Count = 1
    straight: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def words(self) -> str:
        """What is done, for tables."""
        said = ["detector in the loss"] if self.evade else []
        said += [f"mean of {self.draws} draws"] if self.draws > 1 else []
        return ", ".join(said + (["straight through rounding"] if self.straight else [])) or "nothing to adapt to"

    def to(self, system: System, *, evade: float = 1.0) -> Adaptation:
        """What there is to do about ``system``; nothing that is set already is changed.

        Args:
            system: its detector is evaded, its randomness averaged over :data:`DRAWS`, its rounding gone through.
            evade: the weight at which a detector is.
        """
        return replace(
            self,
            evade=self.evade or (0.0 if system.detector is None else evade),
            draws=DRAWS if self.draws == 1 and system.random else self.draws,
            straight=self.straight or system.rounds,
        )

    def direction(self, surrogate: Smooth | BetaSchedule | None = None) -> GradientDirection:
        """The gradient of the system, or of a stand-in, averaged and straight as set."""
        return GradientDirection(surrogate, self.straight, self.draws)

    def evasion(self, system: System) -> Objective:
        """The detector's part of the loss; nothing at a weight of 0."""
        return evasion(self.evade, system)


def evasion(weight: float, system: System) -> Objective:
    """The detector's part of a loss, with its silence as a condition; nothing at a weight of 0.

    Each detector says how it is evaded (``evasion``); one that does not, by the hinge on its soft score.

    Raises:
        InputError: a weight, and a system without a detector.
    """
    if not weight:
        return Sum()
    if system.detector is None:
        raise InputError("evade > 0 needs a system with a detector")
    return evaded_by(system.detector, weight)
