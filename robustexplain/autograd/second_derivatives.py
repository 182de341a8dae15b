"""Second derivatives that torch lacks, by computing the function from others that have them.

torch has no second derivative of its fused attention and of the hard sigmoid (before version 2.9 nor of the hard
swish). Within :func:`twice_differentiable` they are computed step by step, equal up to rounding, as function calls of
this thread, so it does not matter how the model makes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModelError
from .fixed_weights import REPLACED, Replacing

_MISSING = re.compile(
    r"derivative for '?([\w:.]+)'? is not implemented|double backward|once_differentiable|donated buf"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weights ``softmax(q k^T * scale + mask)`` ``[..., L, S]``, and their product with ``value``.

    Arguments are those of ``F.scaled_dot_product_attention``; nothing is dropped, whatever ``dropout_p``. A query that
    may attend to nothing gets weights of zero.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1) if attn_mask is None else torch._safe_softmax(scores, -1)
    return weights, weights @ value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``F.scaled_dot_product_attention``, or ``None`` where it must be torch's own."""
    attached = any(t is not None and t.requires_grad for t in (query, key, value, attn_mask))
    if not attached or dropout_p or query.is_nested or (is_causal and attn_mask is not None):
        return None
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)[1]


def _multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    """``F.multi_head_attention_forward``, which computes step by step only where its weights are asked for."""
    position = 15
    if kwargs.get("need_weights", True) and (len(args) <= position or args[position]):
        return None
    if len(args) > position:
        args = (*args[:position], True, *args[position + 1 :])
    else:
        kwargs = kwargs | {"need_weights": True}
    return F.multi_head_attention_forward(*args, **kwargs)[0], None


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor | None:
    return _written(input, inplace, lambda z: F.hardtanh(z + 3, 0, 6) / 6)


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor | None:
    return _written(input, inplace, lambda z: z * F.hardtanh(z + 3, 0, 6) / 6)


def _written(z: Tensor, inplace: bool, function: Callable[[Tensor], Tensor]) -> Tensor | None:
    if not z.requires_grad:
        return None
    # Autograd needs the old values, and the model may use the tensor that it passed.
    return z.copy_(function(z.clone())) if inplace else function(z)


_COMPOSED: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within this block functions of this thread have second derivatives, and fixed weights cost nothing.

    The latter as :func:`~robustexplain.autograd.fixed_weights.fixed_weights`.
    """
    with Replacing({**REPLACED, **_COMPOSED}):
        yield


@contextmanager
def named_derivatives() -> Iterator[None]:
    """Within this block torch's error about a missing derivative becomes one that says what to do.

    Raises:
        UnsupportedModelError: the model uses an operation without a second derivative; names it.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        lines = str(error).strip().splitlines()
        advice = "the plain model, not a compiled one" if "compile" in lines[0] else "a model without it"
        raise _without_derivative(found[1] or f"{lines[0]:.150}", advice) from error


def refuse_missing_derivatives(values: Tensor) -> None:
    """Refuse values whose graph ends at a function that is differentiable once.

    Torch raises an error at such a function only where nothing else depends on the input, and else leaves its part out.

    Raises:
        UnsupportedModelError: an autograd function marked as ``once_differentiable``.
    """
    waiting, seen = [values.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # By the type: a function of the model may keep a name of its own on its context.
        if type(node).name(node) == "torch::autograd::Error":
            raise _without_derivative("an autograd function marked as once_differentiable", "a model without it")
        waiting += [function for function, _ in node.next_functions]


def _without_derivative(operation: str, advice: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a second derivative of the model is needed, and an operation in it has none in torch ({operation}): pass "
        f"{advice}, or take an interpreter whose map is no gradient, such as CAM or RTS"
    )
