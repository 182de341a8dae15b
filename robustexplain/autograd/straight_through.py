"""Straight through steps that have no gradient: their value forward, the identity backward (BPDA).

Rounding has a derivative of zero, so a gradient search against a quantised input finds nothing, which looks like
robustness (Athalye et al. 2018, "obfuscated gradients"). Within :func:`straight_through`, the function calls that
round keep their values and pass gradients on unchanged. A step that leaves the graph altogether (a NumPy round trip, a
cast to integers, code under ``no_grad``) is out of reach: wrap that module in :class:`StraightThrough`.

A transform in front of a model rounds by :func:`rounded`, for which there are two switches. A map is always made
straight through it (:func:`straight_maps`, which every interpreter enters): a gradient map of a classifier that rounds
its input would be zero everywhere. Whoever differentiates that map, or the logits, gets the true derivative of
rounding, zero, unless told to go straight by :func:`straight_through`: an attack's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from .rectifiers import is_in_place

_ROUNDING = {
    function
    for name in ("round", "floor", "ceil", "trunc", "fix")
    for home in (torch, Tensor)
    for function in (getattr(home, name), getattr(home, f"{name}_"))
}
_SIGN = {torch.sign, Tensor.sign, Tensor.sign_, torch.sgn, Tensor.sgn}


class _StraightThrough(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _ROUNDING and func not in _SIGN:
            return func(*args, **kwargs)
        given: Tensor = args[0] if args else kwargs["input"]
        before = given.clone() if is_in_place(func, args, kwargs) else given
        with torch.no_grad():
            step = func(before.detach().clone(), *args[1:], **kwargs) - before
        passed = before + step
        return given.copy_(passed) if before is not given else passed


@dataclass
class _Switch:
    """Whether a backward pass goes straight through some roundings; looked at when it runs, and not before."""

    on: bool


_told: ContextVar[bool] = ContextVar("told to go straight through", default=False)
_of_the_map: ContextVar[_Switch | None] = ContextVar("the switch of the map that is being made", default=None)


@contextmanager
def straight_through() -> Iterator[None]:
    """Within this block ``round``, ``floor``, ``ceil``, ``trunc`` and ``sign`` have a derivative of one."""
    token = _told.set(True)
    try:
        with _StraightThrough():
            yield
    finally:
        _told.reset(token)


@contextmanager
def straight_maps() -> Iterator[None]:
    """Within this block backward passes go straight through :func:`rounded`; later ones only if told when it ends."""
    switch = _Switch(on=True)
    token = _of_the_map.set(switch)
    try:
        yield
    finally:
        _of_the_map.reset(token)
        switch.on = _told.get()


def rounded(x: Tensor) -> Tensor:
    """``x`` rounded to whole numbers, with a derivative of zero, or of one where a block above says so."""
    switch = _of_the_map.get()
    if switch is None:
        return x.round()
    value: Tensor = _Rounded.apply(x, switch)
    return value


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: _Switch) -> Tensor:
        ctx.switch = switch
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The first derivative is taken while the map is made; the second, by an attack, after that.
        return gradient if ctx.switch.on else torch.zeros_like(gradient), None


class StraightThrough(nn.Module):
    """A module whose derivative an attacker takes for the identity, whatever happens inside.

    Args:
        module: takes and gives tensors of one shape; may round, compress, or leave the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The module's value, with the gradient of the identity.

        Raises:
            InputError: the module changes the shape, so that the identity is no stand-in for its derivative.
        """
        with torch.no_grad():
            value: Tensor = self.module(x.detach())
        if value.shape != x.shape:
            raise InputError(
                f"StraightThrough needs a module that keeps the shape {list(x.shape)}, got {list(value.shape)}"
            )
        passed: Tensor = x + (value - x).detach()
        return passed
