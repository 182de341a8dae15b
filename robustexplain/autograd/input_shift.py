"""Constant input shift: a network with the same outputs on shifted images (Kindermans et al. 2019, section 2).

``f_2(x + m) = f_1(x)`` for every ``x``: the first layer's bias subtracts the shift. The two networks have the same
outputs, weights and gradients; a map that differs between them depends on the position of zero.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..door import answer
from ..errors import InputError, UnsupportedModelError
from ..hidden import refuse_hidden
from .layers import hooks, submodule


class CompensatedConv(nn.Module):
    """A convolution that gives on ``x + shift`` what the plain one gives on ``x``, at the borders too.

    With zero padding the shift would change the border (the paper's identity holds without padding only): here the
    padding value is the shift.

    Args:
        convolution: a plain convolution, zero padding.
        shift: what was added to each input channel, ``[C]``.
    """

    shift: Tensor

    def __init__(self, convolution: nn.Conv2d, shift: Tensor) -> None:
        super().__init__()
        self.convolution = convolution
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution's output ``[B, K, h, w]`` on ``x - shift``."""
        inner = self.convolution
        shift = self.shift.to(x)[:, None, None]
        rows, columns = (int(p) for p in inner.padding)
        x = F.pad(x - shift, (columns, columns, rows, rows)) + shift
        response = F.conv2d(shift.expand(-1, *inner.kernel_size)[None], inner.weight, groups=inner.groups).flatten()
        bias = -response if inner.bias is None else inner.bias - response
        return F.conv2d(x, inner.weight, bias, inner.stride, 0, inner.dilation, inner.groups)


@torch.no_grad()
def compensated(model: nn.Module, x: Tensor, shift: Tensor | float) -> nn.Module:
    """A copy of ``model`` that gives on ``x + shift`` what the model gives on ``x``.

    Args:
        model: its first layer must be a plain convolution or a linear layer on the (normalised) image.
        x: some images ``[B, C, H, W]``, to find that layer.
        shift: what is added to every pixel: one number, or ``[C]``, one a channel.

    Raises:
        UnsupportedModelError: no such first layer, or the copy's outputs differ from the model's.
    """
    refuse_hidden(model, "the first layer is replaced")
    copied, shifted = copy.deepcopy(model), x + per_channel(shift, x)
    name, before = _first(copied, x)
    _, after = _first(copied, shifted)
    layer = submodule(copied, name)
    shifts = (after - before).flatten(2).mean((0, 2)) if before.dim() == 4 else (after - before).mean(0)
    parent, _, leaf = name.rpartition(".")
    setattr(copied.get_submodule(parent), leaf, _compensate(layer, shifts))
    error = float((copied(shifted) - answer(model, x)).abs().max() / answer(model, x).abs().max().clamp(min=1e-12))
    if error > 1e-3:
        raise UnsupportedModelError(
            f"a model is needed whose first layer gets the image alone; after subtracting a shift of {shift} in "
            f"{name!r}, the logits of this {type(model).__name__} still differ by {error:.1%}"
        )
    return copied.eval()


def per_channel(shift: Tensor | float, x: Tensor) -> Tensor:
    """``[C, 1, 1]`` from one number or ``[C]``.

    Raises:
        InputError: another shape.
    """
    values = torch.as_tensor(shift, dtype=x.dtype, device=x.device)
    if values.shape not in ((), x.shape[1:2]):
        raise InputError(f"shift must be one number or [{x.shape[1]}], one a channel, got shape {list(values.shape)}")
    return values.expand(x.shape[1])[:, None, None]


def _compensate(layer: nn.Module, shift: Tensor) -> nn.Module:
    if isinstance(layer, nn.Linear):
        response = layer.weight @ shift
        bias = -response if layer.bias is None else layer.bias - response
        layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer
    return CompensatedConv(layer, shift)  # type: ignore[arg-type]  # _first gives no other


def _first(model: nn.Module, x: Tensor) -> tuple[str, Tensor]:
    """The first layer that runs, and its input."""
    layers = {m: n for n, m in model.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    calls: list[tuple[nn.Module, Tensor]] = []
    with hooks(list(layers), lambda module, args, output: calls.append((module, args[0]))):
        answer(model, x)
    plain = bool(calls) and type(calls[0][0]) in (nn.Conv2d, nn.Linear)
    # A linear layer on patches gets parts of the image.
    plain = plain and (isinstance(calls[0][0], nn.Conv2d) or calls[0][1].dim() == 2)
    if not plain or (isinstance(calls[0][0], nn.Conv2d) and not _zero_padded(calls[0][0])):
        found = type(calls[0][0]).__name__ if calls else "none"
        raise UnsupportedModelError(
            f"a shift is subtracted in the first layer, which must be a plain, zero-padded torch.nn.Conv2d or a "
            f"torch.nn.Linear on the whole image; in this {type(model).__name__} it is {found}"
        )
    return layers[calls[0][0]], calls[0][1]


def _zero_padded(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
