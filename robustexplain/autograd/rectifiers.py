"""Rectifiers, recognised by their function and swapped for a smooth surrogate within a block of code.

A rectifier's second derivative is zero, so the gradient of a gradient map is zero on a ReLU network (ADV2,
section 3.2; Dombrowski et al. 2019, section 3). The swap intercepts the *function calls* (``torch.relu``, ``F.relu6``,
``clamp(min=0)``, in-place forms, ...), so it does not matter whether the model calls a module, a function or a fused
layer of timm. Code in ``torch.compile`` or a C++ extension is not intercepted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import PartlySmoothedWarning, UnsupportedModelError
from ..fields import Positive, check_fields
from ..hidden import refuse_hidden
from ..registry import PARTS


class Smooth(Protocol):
    """A smooth surrogate of ``r(z) = max(z, 0)``."""

    def __call__(self, z: Tensor) -> Tensor:
        """The surrogate's value at ``z``, elementwise."""
        ...


_NONE = math.exp(-40) * (1 + 1e-5)
"""Slopes up to this one are taken for zero; above the rounding of what softplus gives at its cut."""


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.beta, ctx.slope = beta, None
        # Zero below beta z = -40, where value and slope are below exp(-40): smaller values are denormal, which is slow.
        return torch.threshold_(F.softplus(z.clamp(min=-40 / beta), beta), _NONE / beta, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        # A second derivative calls this twice with the same slope.
        ctx.slope = _softplus_slope(z.detach(), ctx.beta) if ctx.slope is None else ctx.slope
        return grads[0] * _SoftplusSlope.apply(z, ctx.slope, ctx.beta), None


class _SoftplusSlope(torch.autograd.Function):
    """The slope as a function of ``z``; its derivatives of any order are computed from its value."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, slope: Tensor, beta: float) -> Tensor:
        slope = slope.view_as(slope)
        ctx.save_for_backward(slope)
        ctx.beta = beta
        return slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.aten.sigmoid_backward(grads[0], *ctx.saved_tensors) * ctx.beta, None, None


def _softplus_slope(z: Tensor, beta: float) -> Tensor:
    """The sigmoid, cut off where the softplus is."""
    return torch.threshold_((beta * z).sigmoid_(), _NONE, 0.0)


@PARTS.register("softplus")
@dataclass(frozen=True)
class Softplus:
    """``log(1 + exp(beta z)) / beta`` (Dombrowski et al. 2019, section 3): forward and backward both smooth."""

    beta: Positive = 10.0

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, z: Tensor) -> Tensor:
        """Softplus of ``z``."""
        result: Tensor = _Softplus.apply(z, self.beta)
        return result


@dataclass(frozen=True)
class HalfHuber:
    """``z^2 / (2 delta)`` up to ``delta``, ``z - delta / 2`` above, 0 below 0 (Woods et al. 2019); no jump in slope."""

    delta: Positive = 0.5

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, z: Tensor) -> Tensor:
        """The half Huber loss of ``z``."""
        bowl = z.clamp(0, self.delta)
        return bowl.square() / (2 * self.delta) + (z - self.delta).clamp(min=0)


class _SmoothGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, tau: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.tau = tau
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        # Torch operations on the saved input, so that the second derivative is that of h(z).
        slope = z / torch.sqrt(z * z + ctx.tau)
        return grads[0] * torch.where(z < 0, 1 + slope, slope), None


@dataclass(frozen=True)
class SmoothGradient:
    """ReLU forward, ADV2's ``h(z)`` as its derivative (section 3.2): maps keep their values, gradients get curvature.

    ``h(z) = z / sqrt(z^2 + tau)`` for ``z >= 0`` and ``1 + z / sqrt(z^2 + tau)`` for ``z < 0``; it jumps at 0, as
    published.
    """

    tau: Positive = 1e-4

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, z: Tensor) -> Tensor:
        """``max(z, 0)``, with ``h`` as its derivative."""
        result: Tensor = _SmoothGradient.apply(z, self.tau)
        return result


_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_RELU6 = {F.relu6}
_HARDTANH = {F.hardtanh, F.hardtanh_}
_CLAMP = {torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_, torch.clip, torch.clip_}
_CLAMP_MIN = {torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_}
_LEAKY = {F.leaky_relu, F.leaky_relu_}
_PRELU = {F.prelu, torch.prelu, Tensor.prelu}
_RRELU = {F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_}
_THRESHOLD = {F.threshold, torch.threshold, torch.threshold_}


Slope = float | Tensor
"""Below 0; a tensor has one a channel."""


def _bounds(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float | None, Slope] | None:
    """``(low, high, slope)`` of a rectifier call: the value kept at and below 0, the cap, the slope below 0."""

    def arg(index: int, name: str, default: Any) -> Any:
        return args[index] if len(args) > index else kwargs.get(name, default)

    value = arg(0, "input", None)
    if isinstance(value, Tensor) and not value.is_floating_point():
        # Clamped indices and counts are integers, which have no gradient.
        return None
    if func in _RELU:
        return 0.0, None, 0.0
    if func in _RELU6:
        return 0.0, 6.0, 0.0
    if func in _HARDTANH:
        low, high = arg(1, "min_val", -1.0), arg(2, "max_val", 1.0)
        return (0.0, high, 0.0) if low == 0 else None
    if func in _CLAMP:
        low, high = arg(1, "min", None), arg(2, "max", None)
        numbers = isinstance(low, (int, float)) and (high is None or isinstance(high, (int, float)))
        return (0.0, high, 0.0) if numbers and low == 0 else None
    if func in _CLAMP_MIN:
        low = arg(1, "min", None)
        return (0.0, None, 0.0) if isinstance(low, (int, float)) and low == 0 else None
    if func in _LEAKY:
        return 0.0, None, float(arg(1, "negative_slope", 0.01))
    if func in _PRELU:
        weight = arg(1, "weight", None)
        # One slope, or one a channel, of an input [B, C, ...].
        return 0.0, None, weight if weight.numel() == 1 else weight.view(-1, *[1] * max(value.dim() - 2, 0))
    if func in _RRELU and not arg(3, "training", False):
        return 0.0, None, (arg(1, "lower", 1 / 8) + arg(2, "upper", 1 / 3)) / 2
    if func in _THRESHOLD:
        return (0.0, None, 0.0) if arg(1, "threshold", None) == 0 and arg(2, "value", None) == 0 else None
    return None


_OTHER_KINKS = {F.hardswish, F.hardsigmoid, F.selu, F.selu_, torch.selu, torch.selu_, *_HARDTANH, *_RRELU}
_AUGMENTED = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
# Position of the argument ``inplace`` in the functions that have one.
_INPLACE_FLAG: dict[Any, int] = {
    **dict.fromkeys((F.relu, F.relu6, F.silu, F.mish, F.selu, F.hardswish, F.hardsigmoid), 1),
    **dict.fromkeys((F.leaky_relu, F.elu, F.celu), 2),
    **dict.fromkeys((F.hardtanh, F.threshold, F.dropout, F.dropout2d, F.alpha_dropout), 3),
    F.rrelu: 4,
}


def is_rectifier(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is a rectifier: ReLU, ReLU6, leaky, parametric or (in eval mode) randomised leaky ReLU, a clamp or
    a threshold at 0, in any of their forms."""
    return _bounds(func, args, kwargs) is not None


def is_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument: ``relu_``, ``relu(inplace=True)``, ``+=``."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in _AUGMENTED
    if name.endswith("_"):
        return True
    index = _INPLACE_FLAG.get(func)
    return index is not None and bool(args[index] if len(args) > index else kwargs.get("inplace", False))


class _Swap(TorchFunctionMode):
    def __init__(self, smooth: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.smooth = smooth
        self.count = 0
        self.left: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        bounds = _bounds(func, args, kwargs)
        if bounds is None:
            if func in _OTHER_KINKS:
                self.left.add(func.__name__.strip("_"))
            return func(*args, **kwargs)
        self.count += 1
        if self.smooth is None:
            return func(*args, **kwargs)
        original = args[0] if args else kwargs["input"]
        if not is_in_place(func, args, kwargs):
            return self._surrogate(original, *bounds[1:])
        # The model may use the tensor that it passed: the result is written there. It is computed from a copy, because
        # autograd needs the old values.
        return original.copy_(self._surrogate(original.clone(), *bounds[1:]))

    def _surrogate(self, z: Tensor, high: float | None, slope: Slope) -> Tensor:
        assert self.smooth is not None
        # The innermost swap decides: an outer one must not replace rectifiers inside this surrogate.
        with torch._C.DisableTorchFunction():
            value = self.smooth(z)
            if high is not None:
                # min(r(z), high) = r(z) - r(z - high): the kink at the cap is smoothed the same way.
                value = value - self.smooth(z - high)
            return value if isinstance(slope, float) and slope == 0 else value + slope * (z - value)


@contextmanager
def swapped(smooth: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this block, every rectifier computes ``smooth`` in place of ``max(z, 0)`` (per thread)."""
    with _Swap(smooth):
        yield


class _Unswapped(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_rectifier(func, args, kwargs):
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)


@contextmanager
def unswapped() -> Iterator[None]:
    """Within this block, rectifiers are what they are, whatever swap is around it; swaps inside of it count."""
    with _Unswapped():
        yield


def count_rectifiers(model: nn.Module, x: Tensor) -> int:
    """How many rectifier calls one forward pass of ``model`` on ``x[:1]`` makes.

    Raises:
        UnsupportedModelError: a model whose calls cannot be seen.
    """
    return _counted(model, x).count


@torch.no_grad()
def _counted(model: nn.Module, x: Tensor) -> _Swap:
    refuse_hidden(model, "the calls of rectifiers are counted")
    mode = _Swap(None)
    with mode:
        model(x[:1].clone())  # any module, not only a classifier
    return mode


def require_rectifiers(model: nn.Module, x: Tensor, purpose: str) -> None:
    """Refuse a model without rectifiers; warn of other activations with kinks (hard-swish), which stay.

    A network of GELU or SiLU alone is smooth as it is: there is nothing to replace.

    Raises:
        UnsupportedModelError: with ``purpose``, which would silently change nothing.
    """
    found = _counted(model, x)
    if found.count and found.left:
        warnings.warn(
            f"{purpose} replaces the rectifiers of this {type(model).__name__} and leaves its "
            f"{' and '.join(sorted(found.left))}, which have kinks too, as they are",
            PartlySmoothedWarning,
            stacklevel=3,
        )
    if found.count == 0:
        raise UnsupportedModelError(
            f"{purpose} replaces rectifiers (ReLU, ReLU6, leaky and parametric ReLU, clamp at 0), but this "
            f"{type(model).__name__} calls none in a forward pass: it would silently change nothing. GELU and SiLU "
            "are smooth already; SmoothGrad averages their gradients over a neighbourhood"
        )
