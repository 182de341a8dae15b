"""Surrogates of a network's rectifiers, by the names that attacks use in their settings."""

from __future__ import annotations

from typing import Literal

from robustexplain.autograd.rectifiers import Smooth, SmoothGradient, Softplus
from robustexplain.interpreters import Interpreter

from .directions import BetaSchedule

Surrogate = Literal["auto", "none", "smooth_gradient", "softplus"]
"""What replaces the rectifiers while gradients are computed."""
Auto = Literal["smooth_gradient", "softplus"]
"""The surrogate that ``auto`` chooses for gradient maps."""


def surrogate_for(
    interpreter: Interpreter,
    word: Surrogate,
    *,
    softplus: Smooth | BetaSchedule | None = None,
    auto: Auto = "smooth_gradient",
) -> Smooth | BetaSchedule | None:
    """The surrogate named ``word``; ``auto`` is one only for maps that are gradients or computed from gradients.

    Args:
        interpreter: its maps are differentiated.
        word: ``none``, ``smooth_gradient`` (ADV2's ``h(z)``), ``softplus``, or ``auto``.
        softplus: the surrogate called ``softplus``; default ``beta = 10``. For iterative interpreters (MASK) always 40.
        auto: the surrogate that ``auto`` chooses for maps that are gradients; for MASK, whose steps are gradients, it
            always chooses ``softplus``.
    """
    iterative = interpreter.iterative
    if word == "auto":
        word = "softplus" if iterative else auto if interpreter.is_gradient else "none"
    if word == "none":
        return None
    if word == "smooth_gradient":
        return SmoothGradient()
    if iterative:
        # The mask of the surrogate must stay close to that of the real model; at beta = 10 they diverge.
        return Softplus(40.0)
    return Softplus() if softplus is None else softplus
