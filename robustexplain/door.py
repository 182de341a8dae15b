"""What a model answers is looked at where it enters: finite, floating logits ``[B, K]``, and its input left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import InputError

_EXPECTED = "a classifier must answer with floating-point logits [B, K], K >= 2"


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """The logits ``[B, K]`` of ``model`` on ``x``, in a forward pass whose answer is looked at.

    The model gets a copy of ``x``, a part of the graph, so that one that writes into its input does no harm.

    Raises:
        InputError: the model's answer is no tensor, not floating point, not ``[B, K]`` with ``K >= 2``, or not finite;
            the model changed its input in place.
    """
    given = x.clone()
    logits: object = model(given)
    if _changed(given, x):
        raise in_place(model)
    return checked(model, logits, len(x))


def checked(model: nn.Module, logits: object, batch: int) -> Tensor:
    """What ``model`` answered on ``batch`` samples, if it is finite logits ``[B, K]``, ``K >= 2``.

    Raises:
        InputError: otherwise, with the model's fault.
    """
    if not isinstance(logits, Tensor):
        raise InputError(_no_tensor(model, logits))
    fault = _fault_of_form(logits, batch)
    if fault:
        raise InputError(f"{_EXPECTED}; this {type(model).__name__} {fault}")
    # One number tells, except where a sum of finite numbers overflows: then all are looked at.
    if not math.isfinite(logits.detach().sum().item()):
        bad = int((~logits.detach().isfinite()).any(1).sum())
        if bad:
            raise InputError(
                f"this {type(model).__name__} answers with NaN or infinite logits on {bad} of {batch} samples: a "
                "prediction or a map of them would mean nothing. Look for weights that are not finite, a division by "
                "zero on flat inputs, or overflow in half precision"
            )
    return logits


def in_place(model: nn.Module) -> InputError:
    """The error about a model that writes into its input."""
    return InputError(
        f"this {type(model).__name__} changes its input in place (such as x.sub_(mean), or Normalize(inplace=True)), "
        "so that a second look at the same x sees other values: compute out of place, as in (x - mean) / std"
    )


def _changed(given: Tensor, x: Tensor) -> bool:
    # Tensors made in inference mode have no version counter.
    return not torch.equal(given, x) if given.is_inference() else given._version > 0


def _no_tensor(model: nn.Module, found: object) -> str:
    kind, part = type(found).__name__, "0"
    if isinstance(found, dict) and found:
        names = [str(name) for name in found]
        kind, part = f"{kind} with {', '.join(names[:5])}", f'"{"logits" if "logits" in names else names[0]}"'
    elif hasattr(found, "logits"):
        part = '"logits"'
    elif isinstance(found, (tuple, list)):
        kind = f"{kind} of {len(found)}"
    adapted = f"; models.Output(model, {part}) makes a classifier of its part {part}"
    return f"{_EXPECTED}, not with a {kind}, as this {type(model).__name__} does{adapted}"


def _fault_of_form(logits: Tensor, batch: int) -> str | None:
    shape = list(logits.shape)
    if logits.layout != torch.strided or logits.is_meta:
        return f"answers with a {logits.layout} tensor on {logits.device.type}, not with a dense one"
    if not logits.is_floating_point():
        return f"answers with {logits.dtype}, such as classes instead of their scores"
    if shape in ([batch], [batch, 1]):
        return f"answers with one logit, {shape}: models.BinaryLogit(model) makes two classes of it"
    if logits.dim() > 2:
        return (
            f"answers with {shape}: of a segmentation or a sequence, explain a number a sample by a callable target=, "
            "or wrap the model in a module that gives [B, K]"
        )
    if logits.dim() < 2 or shape[1] < 2:
        return f"answers with {shape}"
    if shape[0] != batch:
        return f"answers with {shape[0]} rows of logits on {batch} samples"
    return None
