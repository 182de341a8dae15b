"""Maps in a detector's differentiable score: the way in which an adversary can move them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from robustexplain.autograd.rectifiers import SmoothGradient, swapped
from robustexplain.errors import NotDifferentiableError
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.base import Explanation
from robustexplain.registry import INTERPRETERS

Explain = Callable[[Interpreter, Tensor, "Tensor | None"], Explanation]
"""How a detector gets logits and maps of an interpreter, at inputs, of a class."""


def plain(interpreter: Interpreter, x: Tensor, target: Tensor | None = None) -> Explanation:
    """Logits and maps as they are."""
    return interpreter.explain(x, target)


def directed(interpreter: Interpreter, x: Tensor, target: Tensor | None = None) -> Explanation:
    """Logits and maps of a stand-in with a gradient to ``x``.

    A map that is a gradient has none on a network of rectifiers: their derivative is smoothed (ADV2's ``h(z)``), which
    keeps the answers and nearly the maps.

    Raises:
        NotDifferentiableError: a gradient is asked for, and the interpreter has none.
    """
    if torch.is_grad_enabled() and x.requires_grad and not interpreter.differentiable:
        able = ", ".join(e.name for e in INTERPRETERS if getattr(e.build, "differentiable", False) is True)
        raise NotDifferentiableError(
            f"the detector's score comes of the maps of {type(interpreter).__name__}, which have no gradient: attack "
            f"it without gradients (spsa, nes), or watch by an interpreter that has one: {able}"
        )
    with swapped(SmoothGradient()) if interpreter.is_gradient else nullcontext():
        return interpreter.explain(x, target)
