"""Recording the attention that a model computes, and finding the grid of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...autograd import layers
from ...autograd.second_derivatives import attention
from ...door import answer
from ...errors import UnsupportedModelError
from ...hidden import refuse_hidden

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
# Class token, distillation token, registers: models in use have up to five before their patches; prompts add more.
_MOST_PREFIX_TOKENS, _USUAL_PREFIX_TOKENS = 16, 5


class Attentions(TorchFunctionMode):
    """Within this block, the weights of every self-attention are computed explicitly and passed to a function.

    Fused attention and ``nn.MultiheadAttention`` are computed step by step, to the same result up to rounding; a
    softmax over ``[B, heads, N, N]`` is recognised as it is. The weights passed on are those that the model uses, so
    that a gradient reaches them.

    Args:
        receive: called with the weights ``[B, heads, N, N]`` of each attention, in the order they are computed; what it
            gives, if anything, is used in their place.
        others: called with the shape of the weights of every attention that is none of a set of tokens over itself
            (fewer keys, a class token alone), where these are seen.
    """

    def __init__(
        self, receive: Callable[[Tensor], Tensor | None], others: Callable[[torch.Size], None] | None = None
    ) -> None:
        super().__init__()
        self.receive, self.others = receive, others

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not _dropout(args, kwargs):
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and _plain_self_attention(args, kwargs):
            return self._multi_head(*args, **kwargs)
        result = func(*args, **kwargs)
        return self._pass_on(result) if func in _SOFTMAX else result

    def _pass_on(self, weights: Tensor) -> Tensor:
        if weights.dim() == 4 and weights.shape[-1] == weights.shape[-2] > 1:
            replaced = self.receive(weights)
            return weights if replaced is None else replaced
        if weights.dim() > 2 and self.others is not None:
            self.others(weights.shape)
        return weights

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """``softmax(q k^T * scale + mask) v``, from its definition."""
        weights, mixed = attention(query, key, value, *args, **options)
        used = self._pass_on(weights)
        if used is weights:
            return mixed
        groups = query.shape[-3] // value.shape[-3] if options.get("enable_gqa") else 1
        return used @ value.repeat_interleave(groups, -3)

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        heads: int,
        in_weight: Tensor,
        in_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention on ``[N, B, D]`` with packed projections, as torchvision's transformers call it."""
        length, batch, _ = query.shape
        seen: list[Tensor] = []

        def keep(weights: Tensor) -> Tensor | None:
            seen.append(weights)
            return self.receive(weights)

        parts = F.linear(query, in_weight, in_bias).chunk(3, -1)
        q, k, v = (part.reshape(length, batch, heads, -1).permute(1, 2, 0, 3) for part in parts)
        mixed = Attentions(keep, self.others)._attend(q, k, v)
        joined = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
        returned = seen[0] if seen and options.get("need_weights", True) else None
        if returned is not None and options.get("average_attn_weights", True):
            returned = returned.mean(1)
        return F.linear(joined, out_weight, out_bias), returned


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))


def _plain_self_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``F.multi_head_attention_forward`` has one input, packed projections and no mask."""
    if len(args) < 13 or args[0].dim() != 3 or not (args[0] is args[1] is args[2] or _same(*args[:3])):
        return False
    masked = kwargs.get("key_padding_mask") is not None or kwargs.get("attn_mask") is not None
    unusual = args[7] is not None or args[8] is not None or args[9] or kwargs.get("use_separate_proj_weight", False)
    return not (masked or unusual or (args[10] and kwargs.get("training", True)))


def _same(*tensors: Tensor) -> bool:
    # nn.MultiheadAttention transposes its three inputs separately, which gives equal views of one tensor.
    first = tensors[0]
    return all(t.data_ptr() == first.data_ptr() and t.shape == first.shape for t in tensors)


@dataclass(frozen=True)
class Grid:
    """How tokens map to the image: ``prefix`` tokens that are no patches, then ``height x width`` patches by rows."""

    prefix: int
    height: int
    width: int

    @property
    def cells(self) -> int:
        """How many patches there are."""
        return self.height * self.width

    def unfold(self, tokens: Tensor) -> Tensor:
        """The patches of ``[B, N, D]`` as ``[B, D, height, width]``."""
        grid: Tensor = tokens[:, self.prefix :].mT.unflatten(2, (self.height, self.width))
        return grid


def token_grid(model: nn.Module, x: Tensor, tokens: int) -> Grid:
    """The grid of the tokens: that of the feature map they come from, otherwise one with the image's proportions.

    Args:
        model: the transformer.
        x: ``[B, C, H, W]``; only the first image is used.
        tokens: ``N``, prefix tokens included.

    Raises:
        UnsupportedModelError: if no grid fits.
    """
    grid = fitting_grid(tokens, [(v.height, v.width) for v in layers.feature_layers(model, x)], x)
    if grid is None:
        height, width = x.shape[-2:]
        raise UnsupportedModelError(
            f"{tokens} tokens of {type(model).__name__} fit no grid on an image of {height} x {width} pixels: no "
            "feature map has as many positions, and no grid of the image's proportions does"
        )
    return grid


def fitting_grid(tokens: int, maps: Sequence[tuple[int, ...]], x: Tensor) -> Grid | None:
    """The largest of the grids of feature maps ``(h, w)`` that fits, otherwise one with the image's proportions."""
    fits = [(h, w) for h, w in maps if 0 <= tokens - h * w <= _MOST_PREFIX_TOKENS]
    if fits:
        rows, columns = max(fits, key=math.prod)
        return Grid(tokens - rows * columns, rows, columns)
    height, width = x.shape[-2:]
    for prefix in range(min(_USUAL_PREFIX_TOKENS + 1, tokens)):
        rows = round(((tokens - prefix) * height / width) ** 0.5)
        if rows and (tokens - prefix) % rows == 0 and rows * width == (tokens - prefix) // rows * height:
            return Grid(prefix, rows, (tokens - prefix) // rows)
    return None


class _Trace:
    """A record of one forward pass: the tokens that enter the last attention, and whether a feature map follows it.

    Attributes:
        attended: whether any attention ran.
        tokens: the layer whose output enters the last attention.
        mapped: whether a feature map was computed behind it.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.x = x
        self.names = {module: name for name, module in model.named_modules() if name}
        self.stack: list[Tensor | None] = []
        self.outputs: list[tuple[str, Tensor]] = []
        self.attended = self.mapped = False
        self.tokens: str | None = None
        self.weights: torch.Size | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack.append(next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.stack.pop()
        if not isinstance(output, Tensor):
            return
        self.outputs.append((self.names[module], output))
        # Inside attention some modules give [B, heads, N, N] or [B, heads, N, d]: no feature maps.
        mapped = layers.is_feature_map(output, self.x) and output.shape != self.weights
        self.mapped |= mapped and layers.proportional(output.shape[2], output.shape[3], self.x)

    def attend(self, weights: Tensor) -> None:
        """Find the input of the innermost module around this attention that holds its tokens ``[B, N, D]``."""
        self.attended, self.mapped, self.tokens, self.weights = True, False, None, weights.shape
        batch_and_tokens = (weights.shape[0], weights.shape[-1])
        for argument in reversed(self.stack):
            if argument is not None and argument.dim() == 3 and tuple(argument.shape[:2]) == batch_and_tokens:
                self.tokens = next((name for name, out in reversed(self.outputs) if out is argument), None)
                return


@contextmanager
def _traced(model: nn.Module, x: Tensor) -> Iterator[_Trace]:
    trace = _Trace(model, x)
    with layers.hooks(list(trace.names), trace.leave, trace.enter), Attentions(trace.attend):
        yield trace


@torch.no_grad()
def token_layer(model: nn.Module, x: Tensor) -> str | None:
    """The layer whose output enters the last attention, usually the last block's first norm; ``None`` for a CNN.

    Behind the last attention only the class token reaches the head, so the patches are explained in front of it.

    Raises:
        UnsupportedModelError: the model ends in attention whose tokens are no output of a layer (windows, say).
    """
    refuse_hidden(model, "attention and the tokens that enter it are looked for")
    with _traced(model, x) as trace:
        answer(model, x[:1])
    # A hybrid with a feature map behind its last attention is explained as a CNN.
    if not trace.attended or trace.mapped:
        return None
    if trace.tokens is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} ends in attention, but no layer gives the tokens [B, N, D] that it reads "
            "(attention in windows, for one); name a layer that gives them or a feature map, or use a gradient method"
        )
    return trace.tokens
