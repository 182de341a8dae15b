"""Checks of arguments; the message says what was wrong, what was expected, and the offending value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import InputError
from .parts import modules_of

Kind = Literal["images", "tables"]
"""The kind of inputs or maps: images ``[B, C, H, W]`` with maps ``[B, H, W]``, or table rows ``[B, D]``, maps alike."""


def kind_of(values: Tensor) -> Kind:
    """The kind of a batch of inputs or of maps."""
    return "tables" if values.dim() == 2 else "images"


def kind(x: Tensor, takes: Sequence[Kind], what: str) -> None:
    """Refuse inputs of a kind that ``what`` does not take.

    Raises:
        InputError: with both kinds.
    """
    if kind_of(x) not in takes:
        raise InputError(f"{what} takes {' and '.join(takes)}, got {kind_of(x)}: inputs of shape {list(x.shape[1:])}")


def inputs(x: Tensor, name: str = "x") -> None:
    """Refuse anything but images ``[B, C, H, W]`` in ``[0, 1]`` or table rows ``[B, D]`` of any range.

    Either must be floating point, finite and not empty.

    Args:
        x: the batch.
        name: what messages call it.

    Raises:
        InputError: with what was expected and what was found.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise InputError(f"{name} must be floating point, got {x.dtype}; for 8-bit images use x.float() / 255")
    if x.is_nested or x.layout != torch.strided:
        raise InputError(
            f"{name} must be a dense tensor, got one of layout {x.layout}; x.to_dense() makes a sparse one dense"
        )
    if x.is_meta:
        raise InputError(f"{name} must hold values, got a tensor on the meta device, which has none")
    if x.dim() not in (2, 4):
        raise InputError(
            f"{name} must be table rows [B, D] or images [B, C, H, W], got {list(x.shape)}; a single one needs x[None]"
        )
    if x.numel() == 0:
        raise InputError(f"{name} is empty: shape {list(x.shape)}")
    low, high = (float(v) for v in x.detach().aminmax())
    if not (torch.isfinite(torch.tensor([low, high]))).all():
        raise InputError(f"{name} holds NaN or infinity")
    if x.dim() == 4 and (low < 0 or high > 1):
        raise InputError(
            f"{name} must lie in [0, 1], got values from {low:.9g} to {high:.9g}; "
            "normalisation belongs inside the model (see robustexplain.models.Classifier)"
        )


def images(x: Tensor, what: str = "this") -> None:
    """Refuse anything but images: what :func:`inputs` lets pass, without table rows.

    Args:
        x: the batch.
        what: what only takes images, for the message.

    Raises:
        InputError: with what was expected and what was found.
    """
    inputs(x)
    if x.dim() != 4:
        raise InputError(f"{what} takes images [B, C, H, W] in [0, 1], got table rows of shape {list(x.shape)}")


def not_finite(values: Tensor) -> int:
    """The number of samples of ``[B, ...]`` that hold NaN or infinity."""
    # One number tells, except where a sum of finite numbers overflows: then all are looked at.
    if math.isfinite(values.detach().sum().item()):
        return 0
    return int((~values.detach().isfinite()).flatten(1).any(1).sum())


@contextmanager
def one_dtype(x: Tensor, part: object) -> Iterator[None]:
    """Within this block, torch's error about mixed dtypes says what the input and a part's weights are.

    Args:
        x: the input.
        part: a system, an interpreter or a network.

    Raises:
        InputError: in place of that error.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError) or not _DTYPES.search(str(error)):
            raise
        found = [f"{type(m).__name__} {_names(m)}" for m in dict.fromkeys(modules_of(part)) if _names(m)]
        if all(words.endswith(f" {_name(x.dtype)}") for words in found):
            raise InputError(
                f"x and the weights are {_name(x.dtype)}, but the model computes in another dtype inside "
                f"(torch.autocast, a cast in its forward?), which {type(part).__name__} cannot follow; torch mixes no "
                f"dtypes ({str(error).splitlines()[0]}). Take the cast out of the model"
            ) from error
        raise InputError(
            f"x is {_name(x.dtype)}, and the weights are: {', '.join(found) or 'none'}; torch mixes no dtypes "
            f"({str(error).splitlines()[0]}). Give x in the dtype of the model, and move a system as a whole, as by "
            "system.to(dtype), which moves its interpreter and detector too"
        ) from error


_DTYPES = re.compile(
    r"scalar type|same dtype|dtypes? to match|[Mm]ixed dtype|mixed \(CPU\)|type \(.*should be the same|"
    r"must have the same dtype|expected .* dtype|\w+ did not match \w+"
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(module: nn.Module) -> str:
    """The dtypes of a module's weights, in words."""
    tensors = [*module.parameters(), *module.buffers()]
    return " and ".join(sorted({_name(t.dtype) for t in tensors if t.is_floating_point()}))


def evaluating(model: nn.Module, what: str = "the model") -> None:
    """Refuse a model any part of which is in train mode, or is a batch norm without statistics of its own.

    Args:
        model: any module.
        what: it is, for the message.

    Raises:
        InputError: naming the part.
    """
    # Called in every step of an attack: names are looked for only where there is something to say.
    if not any(module.training or _mixes_samples(module) for module in parts_of(model)):
        return
    for name, module in model.named_modules():
        part = f"its part {name!r}" if name else "it"
        if module.training:
            raise InputError(
                f"{what} must be in eval mode, but {part} is in train mode, where batch norm mixes samples and "
                "dropout draws; call .eval() on it first (an exported model has no mode: pass the plain model)"
            )
        if _mixes_samples(module):
            raise InputError(
                f"{what} mixes samples: {part} is a {type(module).__name__} without running statistics "
                "(track_running_stats=False), which takes those of the batch in eval mode too, so that a sample's "
                "result depends on the others; use one with running statistics, or another norm"
            )


def parts_of(model: nn.Module) -> list[nn.Module]:
    """The module and all below it; one that is used twice may appear twice."""
    found = [model]
    for module in found:  # grows
        found += [part for part in module._modules.values() if part is not None]
    return found


def _mixes_samples(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None


def classes(c: Tensor, batch: int, num_classes: int, name: str) -> None:
    """Refuse anything but ``batch`` class indices in ``[0, num_classes)``.

    Raises:
        InputError: naming the argument, what was expected and what was found.
    """
    class_indices(c, batch, name)
    if int(c.min()) < 0 or int(c.max()) >= num_classes:
        bad = c[(c < 0) | (c >= num_classes)][0]
        raise InputError(f"{name} holds class {int(bad)}, but the model has classes 0 to {num_classes - 1}")


def class_indices(c: Tensor, batch: int, name: str) -> None:
    """Refuse anything but one integer a sample; :func:`classes` checks their range too.

    Raises:
        InputError: naming the argument, what was expected and what was found.
    """
    if not isinstance(c, Tensor) or c.dtype not in (torch.int64, torch.int32):
        got = c.dtype if isinstance(c, Tensor) else type(c).__name__
        raise InputError(f"{name} must be an integer tensor of class indices, got {got}")
    if c.shape != (batch,):
        raise InputError(f"{name} must have shape [{batch}], one class per sample, got {list(c.shape)}")


def maps_like(maps: Tensor, x: Tensor, name: str) -> None:
    """Refuse anything but finite maps ``[B, H, W]`` at the size of ``x`` (``[B, D]`` for tabular ``x``).

    Raises:
        InputError: naming the argument, what was expected and what was found.
    """
    expected = [x.shape[0], *x.shape[2:]] if x.dim() == 4 else list(x.shape)
    if list(maps.shape) != expected:
        raise InputError(f"{name} must have shape {expected}, got {list(maps.shape)}")
    if not torch.isfinite(maps).all():
        raise InputError(f"{name} holds NaN or infinity")
