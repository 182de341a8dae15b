"""The gradient of batch norms for a batch of one image, which torch gets wrong on some layouts of memory.

Where a map ``[1, C, h, w]`` is viewed as tokens ``[1, N, C]``, as in LeViT, XCiT and EfficientFormer, the gradient that
comes back has an arbitrary stride in its first axis; the backward pass of ``batch_norm`` of torch 2.14 on a CPU then
mixes up two layouts, in silence.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .hidden import hidden


class _OrderedNorms(TorchFunctionMode):
    """Within this block batch norms of one sample get their input and their gradient in the usual order of memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm or not args:
            return func(*args, **(kwargs or {}))
        result: Tensor = func(ordered(args[0]), *args[1:], **(kwargs or {}))
        if result.requires_grad and len(result) == 1:
            result.register_hook(ordered)
        return result


def ordered(value: Tensor) -> Tensor:
    """The same values in the usual order of memory, where they are one sample's and the order is in doubt."""
    doubtful = value.dim() > 2 and len(value) == 1 and value.stride(0) != value.numel()
    return value.clone(memory_format=torch.contiguous_format) if doubtful else value


def ordered_norms(model: nn.Module, x: Tensor) -> AbstractContextManager[object]:
    """The block for a forward pass of ``model`` on ``x``: nothing where no gradient of a single sample is wanted."""
    if len(x) != 1 or x.dim() < 3 or not torch.is_grad_enabled() or hidden(model) is not None:
        return nullcontext()
    return _OrderedNorms()
