"""A warning for maps whose derivative is zero: on rectifiers a gradient is piecewise constant.

An attack or a training that follows the derivative of such a map makes no progress, which looks like robustness.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from ..errors import ZeroMapGradientWarning

_disabled: ContextVar[bool] = ContextVar("zero gradient check disabled", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Disable the check for maps computed in this block, whose caller looks at the gradient itself."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def is_unchecked() -> bool:
    """Whether this is a block of :func:`unchecked`."""
    return _disabled.get()


@dataclass
class ZeroGradientCheck:
    """Warns of zero gradients at the input of an interpreter, until one is not zero.

    Args:
        name: of the interpreter, for the warning.
        nonzero: whether a gradient was not zero.
    """

    name: str
    nonzero: bool = False

    @property
    def needed(self) -> bool:
        """Whether no gradient was nonzero so far and the check is not disabled."""
        return not self.nonzero and not is_unchecked()

    def watch(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A view of ``x`` with a hook on its gradient, and a function that starts the check once the map is computed.

        Computing the map is itself a backward pass, whose gradient says nothing about the map's derivative.
        """
        started = False

        def start() -> None:
            nonlocal started
            started = True

        def look(gradient: Tensor) -> None:
            if started and not self.nonzero:
                self.nonzero = bool(gradient.any())
                if not self.nonzero:
                    warnings.warn(zero_gradient_message(self.name), ZeroMapGradientWarning, stacklevel=2)

        watched = x.view_as(x)
        watched.register_hook(look)
        return watched, start


def zero_gradient_message(name: str) -> str:
    """The warning for a map whose derivative is zero, with what to do about it."""
    return (
        f"the derivative of this {name} map with respect to the input is exactly zero: the map is a gradient, and "
        "on rectifiers (ReLU) a gradient is piecewise constant. Take directions from a surrogate: "
        "`with robustexplain.autograd.rectifiers.swapped(Softplus(10)):` (softplus, beta 10) or "
        "`swapped(SmoothGradient())` (ADV2's h(z)), or surrogate='softplus' / "
        "'smooth_gradient' of an attack; and evaluate on the real model"
    )
