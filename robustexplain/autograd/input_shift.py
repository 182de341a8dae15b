"""Constant input shift: another network that computes the same from shifted images (Kindermans et al. 2019, section 2).

``f_2(x + m) = f_1(x)`` for every ``x``: the first layer's bias takes the shift back. The two networks answer alike and
have the same weights and the same gradients; a map that differs between them depends on where zero lies.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from .layers import hooks, submodule


class CompensatedConv(nn.Module):
    """A convolution that gives on ``x + shift`` what the plain one gives on ``x``, at the borders too.

    A zero-padded border would see the shift (the paper's identity holds without padding only): here the padding is the
    shift itself.

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
        """The convolution's output ``[B, K, h, w]``, shift taken back."""
        inner = self.convolution
        shift = self.shift.to(x)[:, None, None]
        rows, columns = (int(p) for p in inner.padding)
        x = F.pad(x - shift, (columns, columns, rows, rows)) + shift
        back = F.conv2d(shift.expand(-1, *inner.kernel_size)[None], inner.weight, groups=inner.groups).flatten()
        bias = -back if inner.bias is None else inner.bias - back
        return F.conv2d(x, inner.weight, bias, inner.stride, 0, inner.dilation, inner.groups)


@torch.no_grad()
def compensated(model: nn.Module, x: Tensor, shift: Tensor | float) -> nn.Module:
    """A copy of ``model`` that gives on ``x + shift`` what the model gives on ``x``.

    Args:
        model: its first layer must be a plain convolution or a linear layer on the (normalised) image.
        x: some images ``[B, C, H, W]``, to find that layer.
        shift: what is added to every pixel: one number, or ``[C]``, one a channel.

    Raises:
        UnsupportedModelError: no such first layer, or the copy does not answer as the model does.
    """
    twin, shifted = copy.deepcopy(model), x + per_channel(shift, x)
    name, given = _first(twin, x)
    _, moved = _first(twin, shifted)
    layer = submodule(twin, name)
    shifts = (moved - given).flatten(2).mean((0, 2)) if given.dim() == 4 else (moved - given).mean(0)
    parent, _, leaf = name.rpartition(".")
    setattr(twin.get_submodule(parent), leaf, _compensate(layer, shifts))
    error = float((twin(shifted) - model(x)).abs().max() / model(x).abs().max().clamp(min=1e-12))
    if error > 1e-3:
        raise UnsupportedModelError(
            f"a model is needed whose first layer sees the image alone; after taking a shift of {shift} back in "
            f"{name!r}, the logits of this {type(model).__name__} still differ by {error:.1%}"
        )
    return twin.eval()


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
        back = layer.weight @ shift
        layer.bias = nn.Parameter(-back if layer.bias is None else layer.bias - back, requires_grad=False)
        return layer
    return CompensatedConv(layer, shift)  # type: ignore[arg-type]  # _first gives no other


def _first(model: nn.Module, x: Tensor) -> tuple[str, Tensor]:
    """The first layer that runs, and what it is given."""
    layers = {m: n for n, m in model.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    seen: list[tuple[nn.Module, Tensor]] = []
    with hooks(list(layers), lambda module, args, output: seen.append((module, args[0]))):
        model(x)
    plain = bool(seen) and type(seen[0][0]) in (nn.Conv2d, nn.Linear)
    if not plain or (isinstance(seen[0][0], nn.Conv2d) and not _zero_padded(seen[0][0])):
        found = type(seen[0][0]).__name__ if seen else "none"
        raise UnsupportedModelError(
            f"a shift is taken back in the first layer, which must be a plain, zero-padded torch.nn.Conv2d or a "
            f"torch.nn.Linear; in this {type(model).__name__} it is {found}"
        )
    return layers[seen[0][0]], seen[0][1]


def _zero_padded(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
