"""Straight-through estimation of steps without a gradient: their value forward, the identity backward (BPDA).

Rounding has a derivative of zero, so a gradient search against a quantised input finds nothing, which looks like
robustness (Athalye et al. 2018, "obfuscated gradients"). Within :func:`straight_through`, the function calls that
round keep their values and pass gradients on unchanged. A step that leaves the graph altogether (a NumPy round trip, a
cast to integers, code under ``no_grad``) is not covered: wrap that module in :class:`StraightThrough`.

A transform in front of a model rounds by :func:`rounded`, whose derivative depends on two contexts. Inside
:func:`straight_maps`, which every interpreter enters, it is one: a gradient map of a classifier that rounds its input
would otherwise be zero everywhere. The derivative of such a map, or of the logits, is the true one of rounding, zero,
unless it is computed inside :func:`straight_through`, which an attack may choose.
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
        original: Tensor = args[0] if args else kwargs["input"]
        before = original.clone() if is_in_place(func, args, kwargs) else original
        with torch.no_grad():
            step = func(before.detach().clone(), *args[1:], **kwargs)
        # Added to nothing: the value is the step's own, to the bit.
        passed = step + (before - before.detach())
        return original.copy_(passed) if before is not original else passed


@dataclass
class _Switch:
    """Whether the backward pass of some roundings is the identity; read when the pass runs."""

    on: bool


_straight: ContextVar[bool] = ContextVar("inside straight_through", default=False)
_map_switch: ContextVar[_Switch | None] = ContextVar("switch of the map that is computed", default=None)


@contextmanager
def straight_through() -> Iterator[None]:
    """Within this block ``round``, ``floor``, ``ceil``, ``trunc`` and ``sign`` have a derivative of one."""
    token = _straight.set(True)
    try:
        with _StraightThrough():
            yield
    finally:
        _straight.reset(token)


def is_straight() -> bool:
    """Whether the caller is inside :func:`straight_through`."""
    return _straight.get()


@contextmanager
def straight_maps() -> Iterator[None]:
    """Within this block :func:`rounded` has a derivative of one; afterwards only inside :func:`straight_through`."""
    switch = _Switch(on=True)
    token = _map_switch.set(switch)
    try:
        yield
    finally:
        _map_switch.reset(token)
        switch.on = _straight.get()


def rounded(x: Tensor) -> Tensor:
    """``x`` rounded to whole numbers, with a derivative of zero, or of one inside the contexts above."""
    switch = _map_switch.get()
    if switch is None:
        return x.round()
    value: Tensor = _Rounded.apply(x, switch)
    return value


def stepped(x: Tensor, value: Tensor) -> Tensor:
    """``value``, which was computed from ``x`` outside of the graph, with the derivative by ``x`` that rounding has."""
    switch = _map_switch.get() or _Switch(on=_straight.get())
    found: Tensor = _Stepped.apply(x, value.detach(), switch)
    return found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: _Switch) -> Tensor:
        ctx.switch = switch
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The first derivative is computed with the map; the second, by an attack, later.
        return gradient if ctx.switch.on else torch.zeros_like(gradient), None


class _Stepped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, switch: _Switch) -> Tensor:
        ctx.switch = switch
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient if ctx.switch.on else torch.zeros_like(gradient), None, None


class StraightThrough(nn.Module):
    """A module with the identity as its derivative, whatever it computes.

    Args:
        module: takes and gives tensors of one shape; may round, compress, or leave the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The module's value, with the gradient of the identity.

        Raises:
            InputError: the module changes the shape, so that the identity cannot replace its derivative.
        """
        with torch.no_grad():
            value: Tensor = self.module(x.detach())
        if value.shape != x.shape:
            raise InputError(
                f"StraightThrough needs a module that keeps the shape {list(x.shape)}, got {list(value.shape)}"
            )
        passed: Tensor = value.detach() + (x - x.detach())
        return passed
