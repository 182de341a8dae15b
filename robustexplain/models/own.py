"""A classifier of the user's own, from a Python file that the user trusts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..answers import Name, outputs
from ..errors import InputError, RobustExplainWarning
from ..own_code import OwnCode
from .output import adapted
from .weights import load_state, read


def load_own(
    code: OwnCode,
    shape: Sequence[int],
    num_classes: int,
    *,
    options: Mapping[str, Any] | None = None,
    weights: str | PathLike[str] | None = None,
    weights_key: str | None = None,
    seed: int = 0,
    output: Name | None = None,
    binary: bool = False,
) -> nn.Module:
    """The ``nn.Module`` that a user's class or function returns, checked and in eval mode.

    It is given ``num_classes`` (1 for one logit), and ``in_channels`` or ``in_features``, where it takes them.

    Args:
        code: the file and the name in it; its code runs only if it is trusted.
        shape: of one input, ``(C, H, W)`` in ``[0, 1]`` or ``(D,)``.
        num_classes: of the data.
        options: further keyword arguments.
        weights: a safetensors file or a torch state dict.
        weights_key: which of a checkpoint's state dicts, as ``models.load`` takes it.
        seed: seed of the random weights; the global random state is left alone.
        output: which output the logits are, where it answers with several (:class:`models.Output`).
        binary: it gives one logit for two classes (:class:`models.BinaryLogit`).

    Raises:
        InputError: not trusted; no module; logits of another shape than ``[B, num_classes]``; weights that do not fit.
    """
    size = {"in_features" if len(shape) == 1 else "in_channels": shape[0]}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = code.called(dict(options or {}), {"num_classes": 1 if binary else num_classes, **size})
    if not isinstance(model, nn.Module):
        raise InputError(f"{code.name} of {code.file} must make a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        load_state(model, read(weights, weights_key), str(weights))
    model = adapted(model, output, binary).eval()
    _check(code, model, shape, num_classes)
    side = shape[-1] if len(shape) == 3 else None
    for name, value in {"num_classes": num_classes, **size, "input_size": side}.items():
        if not hasattr(model, name):
            setattr(model, name, value)
    return model


@torch.no_grad()
def _check(code: OwnCode, model: nn.Module, shape: Sequence[int], num_classes: int) -> None:
    """Two inputs through the model: logits ``[2, num_classes]``, finite, floating point."""
    probe = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    logits = code.guarded(lambda: model(probe))
    what = f"{code.name} of {code.file}"
    if not isinstance(logits, Tensor):
        names = ", ".join(repr(name) for name, _ in outputs(logits))
        hint = f"; say which of its outputs they are, with output: one of {names}" if names else ""
        raise InputError(f"{what} must give one tensor of logits [B, {num_classes}], got {type(logits).__name__}{hint}")
    if num_classes == 2 and logits.shape in ((2,), (2, 1)):
        raise InputError(f"{what} gives one logit, {list(logits.shape)}, for two classes; say so with binary: true")
    if logits.shape != (2, num_classes) or num_classes < 2:
        raise InputError(
            f"{what} must give logits [B, K] with K = {num_classes} classes of the data (two at least), got "
            f"{list(logits.shape)} of inputs {list(probe.shape)}"
        )
    if not logits.is_floating_point() or not bool(torch.isfinite(logits).all()):
        raise InputError(f"{what} must give finite floating point logits, got {logits.dtype}: {logits[0].tolist()[:4]}")
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones(2)):
        warnings.warn(f"{what} gives numbers that sum to 1: logits are needed, not probabilities", RobustExplainWarning)
