"""What an adversary who knows the detector adds to its loss."""

from __future__ import annotations

from robustexplain.errors import InputError
from robustexplain.objectives import AgreeSqueezed, EvadeDetector, EvadeSqueezing, Objective, Sum
from robustexplain.system import System
from robustexplain.transforms import Squeezing


def evasion(weight: float, system: System) -> Objective:
    """The detector's part of a loss, with its silence as a condition; nothing at a weight of 0.

    The hinge on the detector's soft score; against feature squeezing, whose score saturates on confident networks, the
    cross-entropy between predictions before and after squeezing (Zhang et al. 2020, section 4 Q3).

    Raises:
        InputError: a weight, and a system without a detector.
    """
    if not weight:
        return Sum()
    detector = system.detector
    if detector is None:
        raise InputError("evade > 0 needs a system with a detector")
    if isinstance(detector, Squeezing):
        silent = EvadeSqueezing(detector.squeezers, (0.0,) * len(detector.squeezers), detector.threshold)
        return silent + weight * AgreeSqueezed(detector.squeezers)
    return weight * EvadeDetector(detector.soft_threshold)
