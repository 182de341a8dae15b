"""Convolutions and batch norms with fixed weights, differentiated twice for their inputs alone.

Torch's second derivative of a convolution computes the weights' part even if it is not needed, and for grouped
convolutions one group at a time: on a network of depthwise convolutions this is most of the time of an attack on a
gradient map. A batch norm in eval mode with fixed weights is affine and has no second derivative at all, but torch's
computes one. Both are replaced as function calls, so it does not matter how the model makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode


class _Layout(NamedTuple):
    """How a convolution moves over its input, in the order of torch's arguments."""

    stride: int | tuple[int, ...]
    padding: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    groups: int


class _Norm(NamedTuple):
    """The fixed numbers of a batch norm."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class _Convolution(torch.autograd.Function):
    """A convolution as a map of its input alone; its adjoint is :class:`_Adjoint`, and the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: _Layout) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layout, ctx.shape = layout, x.shape
        return F.conv2d(x, weight, bias, *layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Adjoint.apply(grads[0], *ctx.saved_tensors, ctx.layout, ctx.shape), None, None, None


class _Adjoint(torch.autograd.Function):
    """The adjoint of :class:`_Convolution`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, layout: _Layout, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layout = layout
        return conv2d_input(shape, weight, gradient, *layout)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Convolution.apply(grads[0], *ctx.saved_tensors, None, ctx.layout), None, None, None


class _BatchNorm(torch.autograd.Function):
    """A batch norm in eval mode; its adjoint, :class:`_Scaling`, is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: _Norm) -> Tensor:
        ctx.save_for_backward(norm.mean, norm.variance, norm.weight)
        ctx.eps = norm.eps
        return F.batch_norm(x, norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        mean, variance, weight = ctx.saved_tensors
        return _Scaling.apply(grads[0], _Norm(mean, variance, weight, None, ctx.eps)), None


class _Scaling(torch.autograd.Function):
    """The adjoint of :class:`_BatchNorm`, and its own: by torch's own kernel, with the same bits."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, norm: _Norm) -> Tensor:
        mean, variance, weight, _, ctx.eps = norm
        ctx.save_for_backward(mean, variance, weight)
        # In eval mode the input is not used: the gradient is passed in its place.
        scaled: Tensor = torch.ops.aten.native_batch_norm_backward(
            gradient, gradient, weight, mean, variance, None, None, False, norm.eps, [True, False, False]
        )[0]
        return scaled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        mean, variance, weight = ctx.saved_tensors
        return _Scaling.apply(grads[0], _Norm(mean, variance, weight, None, ctx.eps)), None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor | None:
    """``F.conv2d``, or ``None`` where it must be torch's own."""
    if input.dim() != 4 or isinstance(padding, str) or not _fixed(input, weight, bias):
        return None
    result: Tensor = _Convolution.apply(input, weight, bias, _Layout(stride, padding, dilation, groups))
    return result


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """``F.batch_norm``, or ``None`` where it must be torch's own."""
    if training or running_mean is None or running_var is None or not _fixed(input, running_var, weight, bias):
        return None
    result: Tensor = _BatchNorm.apply(input, _Norm(running_mean, running_var, weight, bias, eps))
    return result


def _fixed(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether only ``x`` is differentiated, and autocast is off."""
    plain = x.requires_grad and not torch.is_autocast_enabled(x.device.type)
    return plain and all(weight is None or not weight.requires_grad for weight in weights)


REPLACED: Mapping[Any, Callable[..., Any]] = {F.conv2d: _convolution, F.batch_norm: _batch_norm}
"""What :class:`Replacing` computes in place of torch's functions; ``None`` from it means: torch's own."""


class Replacing(TorchFunctionMode):
    """Within this block some of torch's functions are replaced (per thread).

    Args:
        table: by function, what computes it with the same arguments, or gives ``None`` where it must be torch's own.
    """

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replaced = self.table.get(func)
        if replaced is not None:
            with torch._C.DisableTorchFunction():
                result = replaced(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


@contextmanager
def fixed_weights() -> Iterator[None]:
    """Within this block, layers whose weights need no gradient spend nothing on one (per thread).

    Values and gradients stay the same bits, and derivatives of every order are exact. Layers whose weights need a
    gradient, whose batch norm is in train mode, or that run under autocast, are left to torch.
    """
    with Replacing(REPLACED):
        yield
