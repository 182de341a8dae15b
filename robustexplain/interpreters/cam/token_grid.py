"""Seeing attention by what a model computes, and finding the tokens it works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...autograd import layers
from ...errors import UnsupportedModelError

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
# Class token, distillation token, registers: families in use put up to five before their patches; prompts add some.
_MOST_PREFIX_TOKENS, _USUAL_PREFIX_TOKENS = 16, 5


class Attentions(TorchFunctionMode):
    """Within this block, every self-attention computes its weights openly and hands them over.

    Fused attention and ``nn.MultiheadAttention`` are computed step by step, to the same result up to rounding; a
    softmax over ``[B, heads, N, N]`` is taken as it is. The weights handed over are those that the model goes on with,
    so that a gradient reaches them.

    Args:
        found: called with the weights ``[B, heads, N, N]`` of each attention, in the order they are computed.
    """

    def __init__(self, found: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not _dropout(args, kwargs):
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and _plain_self_attention(args, kwargs):
            return self._multi_head(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX:
            self._offer(result)
        return result

    def _offer(self, weights: Tensor) -> None:
        if weights.dim() == 4 and weights.shape[-1] == weights.shape[-2] > 1:
            self.found(weights)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``softmax(q k^T * scale + mask) v``, from its definition."""
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
        weights = scores.softmax(-1)
        self._offer(weights)
        return weights @ value

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
        """Self-attention on ``[N, B, D]`` with packed projections: what a torchvision transformer calls."""
        length, batch, _ = query.shape
        seen: list[Tensor] = []
        parts = F.linear(query, in_weight, in_bias).chunk(3, -1)
        q, k, v = (part.reshape(length, batch, heads, -1).permute(1, 2, 0, 3) for part in parts)
        mixed = Attentions(seen.append)._attend(q, k, v)
        for weights in seen:
            self.found(weights)
        joined = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
        shown = seen[0] if seen and options.get("need_weights", True) else None
        if shown is not None and options.get("average_attn_weights", True):
            shown = shown.mean(1)
        return F.linear(joined, out_weight, out_bias), shown


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
    # nn.MultiheadAttention transposes its three inputs apart: equal views of one tensor.
    first = tensors[0]
    return all(t.data_ptr() == first.data_ptr() and t.shape == first.shape for t in tensors)


@dataclass(frozen=True)
class Grid:
    """How tokens lie on the image: ``prefix`` of them are no patches, then ``height x width`` patches row by row."""

    prefix: int
    height: int
    width: int

    def unfold(self, tokens: Tensor) -> Tensor:
        """The patches of ``[B, N, D]`` as ``[B, D, height, width]``."""
        grid: Tensor = tokens[:, self.prefix :].mT.unflatten(2, (self.height, self.width))
        return grid


def token_grid(model: nn.Module, x: Tensor, tokens: int) -> Grid:
    """The grid of ``tokens`` tokens: that of the feature map they were made from, else one of the image's proportions.

    Args:
        model: the transformer.
        x: ``[B, C, H, W]``; the first is passed.
        tokens: ``N``, prefix tokens included.

    Raises:
        UnsupportedModelError: if no grid fits.
    """
    fits = [v for v in layers.feature_layers(model, x) if 0 <= tokens - v.height * v.width <= _MOST_PREFIX_TOKENS]
    if fits:
        best = max(fits, key=lambda layer: layer.height * layer.width)
        return Grid(tokens - best.height * best.width, best.height, best.width)
    height, width = x.shape[-2:]
    for prefix in range(min(_USUAL_PREFIX_TOKENS + 1, tokens)):
        rows = round(((tokens - prefix) * height / width) ** 0.5)
        if rows and (tokens - prefix) % rows == 0 and rows * width == (tokens - prefix) // rows * height:
            return Grid(prefix, rows, (tokens - prefix) // rows)
    raise UnsupportedModelError(
        f"{tokens} tokens of {type(model).__name__} fit no grid on an image of {height} x {width} pixels: no feature "
        "map has as many places, and no grid of the image's proportions does"
    )


class _Trace:
    """What runs in one forward pass: the tokens that the last attention reads, and whether a feature map follows.

    Attributes:
        attended: whether any attention ran.
        tokens: the layer whose output the last one reads.
        mapped: whether a feature map was made behind it.
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
        # Inside attention some modules give [B, heads, N, N] or [B, heads, N, d], which are no feature maps.
        mapped = layers.is_feature_map(output, self.x) and output.shape != self.weights
        self.mapped |= mapped and layers.proportional(output.shape[2], output.shape[3], self.x)

    def attend(self, weights: Tensor) -> None:
        """Find the input of the innermost module around this attention that holds its tokens ``[B, N, D]``."""
        self.attended, self.mapped, self.tokens, self.weights = True, False, None, weights.shape
        wanted = (weights.shape[0], weights.shape[-1])
        for given in reversed(self.stack):
            if given is not None and given.dim() == 3 and tuple(given.shape[:2]) == wanted:
                self.tokens = next((name for name, out in reversed(self.outputs) if out is given), None)
                return


@contextmanager
def _traced(model: nn.Module, x: Tensor) -> Iterator[_Trace]:
    trace = _Trace(model, x)
    with ExitStack() as stack:
        for module in trace.names:
            stack.callback(module.register_forward_pre_hook(trace.enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(trace.leave).remove)
        stack.enter_context(Attentions(trace.attend))
        yield trace


@torch.no_grad()
def token_layer(model: nn.Module, x: Tensor) -> str | None:
    """The layer whose output the last attention reads: mostly the last block's first norm. ``None`` for a CNN.

    Behind the last attention only the class token reaches the head, so the patches are explained in front of it.

    Raises:
        UnsupportedModelError: the model ends in attention whose tokens are no output of a layer (windows, say).
    """
    with _traced(model, x) as trace:
        model(x[:1])
    # A feature map behind the last attention is what a hybrid ends in: it is explained as a CNN.
    if not trace.attended or trace.mapped:
        return None
    if trace.tokens is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} ends in attention, but no layer gives the tokens [B, N, D] that it reads "
            "(attention in windows, for one); name a layer that gives them or a feature map, or use a gradient method"
        )
    return trace.tokens
