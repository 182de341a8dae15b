"""Maps without a derivative say so: on rectifiers a gradient is constant in pieces, and its own derivative is zero.

An attack or a training that follows such a map finds nothing, and its failure looks like robustness.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from ..errors import ZeroMapGradientWarning

_unwatched: ContextVar[bool] = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Maps made in this block keep silent: whoever differentiates them looks at the gradient himself."""
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


@dataclass
class ZeroGradientCheck:
    """Looks at the first gradients that come back to the input of an interpreter, until one is not zero."""

    name: str
    alive: bool = False

    @property
    def needed(self) -> bool:
        """Whether there is still something to find out, and somebody who does not look himself."""
        return not self.alive and not _unwatched.get()

    def over(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """``x`` under watch, and a function that starts the watch: the pass that makes the map is not looked at."""
        started = False

        def start() -> None:
            nonlocal started
            started = True

        def look(gradient: Tensor) -> None:
            if started and not self.alive:
                self.alive = bool(gradient.any())
                if not self.alive:
                    warnings.warn(flat_message(self.name), ZeroMapGradientWarning, stacklevel=2)

        watched = x.view_as(x)
        watched.register_hook(look)
        return watched, start


def flat_message(name: str) -> str:
    """What a map says whose derivative is zero, with the ways out by name."""
    return (
        f"the derivative of this {name} map with respect to the input is exactly zero: the map is a gradient, and "
        "on rectifiers (ReLU) a gradient is constant in pieces. Take directions from a surrogate: "
        "`with robustexplain.autograd.rectifiers.swapped(Softplus(10)):` (softplus, beta 10) or "
        "`swapped(SmoothGradient())` (ADV2's h(z)), or surrogate='softplus' / "
        "'smooth_gradient' of an attack; and judge on the real model"
    )
