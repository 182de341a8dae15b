"""What an adversary who knows the detector adds to its loss."""

from __future__ import annotations

from robustexplain.errors import InputError
from robustexplain.objectives import Objective, Sum
from robustexplain.objectives.evasion import evade
from robustexplain.system import System


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
    return evade(system.detector, weight)
