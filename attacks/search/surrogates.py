"""Stand-ins for a network's rectifiers, by the words that attacks' settings use."""

from __future__ import annotations

from typing import Literal

from robustexplain.autograd.rectifiers import Smooth, SmoothGradient, Softplus
from robustexplain.interpreters import Interpreter

from .directions import BetaSchedule

Surrogate = Literal["auto", "none", "smooth_gradient", "softplus"]
"""What rectifiers compute while directions are sought."""
Auto = Literal["smooth_gradient", "softplus"]
"""What ``auto`` may stand for."""


def surrogate_for(
    interpreter: Interpreter,
    word: Surrogate,
    *,
    softplus: Smooth | BetaSchedule | None = None,
    auto: Auto = "smooth_gradient",
) -> Smooth | BetaSchedule | None:
    """The stand-in that ``word`` means; ``auto`` needs one only where the map is a gradient, or made of some.

    Args:
        interpreter: whose maps are followed.
        word: ``none``, ``smooth_gradient`` (ADV2's ``h(z)``), ``softplus``, or ``auto``.
        softplus: what ``softplus`` means here; default ``beta = 10``. Against MASK and its like ``beta = 40``.
        auto: what ``auto`` means for maps that are gradients; for MASK, whose steps are, it means ``softplus``.
    """
    iterative = interpreter.iterative
    if word == "auto":
        word = "softplus" if iterative else auto if interpreter.is_gradient else "none"
    if word == "none":
        return None
    if word == "smooth_gradient":
        return SmoothGradient()
    if iterative:
        # The stand-in's own mask must come near the real one: at beta = 10 they part.
        return Softplus(40.0)
    return Softplus() if softplus is None else softplus
