"""Straight through steps that have no gradient: their value forward, the identity backward (BPDA).

Rounding has a derivative of zero, so a gradient search against a quantised input finds nothing, which looks like
robustness (Athalye et al. 2018, "obfuscated gradients"). Within :func:`straight_through`, the function calls that
round keep their values and pass gradients on unchanged. A step that leaves the graph altogether (a NumPy round trip, a
cast to integers, code under ``no_grad``) is out of reach: wrap that module in :class:`StraightThrough`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def straight_through() -> Iterator[None]:
    """Within this block ``round``, ``floor``, ``ceil``, ``trunc`` and ``sign`` have a derivative of one."""
    with _StraightThrough():
        yield


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
