"""What a model answers and does is looked at where it enters.

:func:`answer` looks at every forward pass: finite, floating-point logits ``[B, K]``, and the input left alone.
:func:`admit` looks once at what a single pass does not show: that a sample's logits depend on that sample alone.
"""

from __future__ import annotations

import threading
import weakref
from itertools import chain

import torch
from torch import Tensor, nn

from . import checks
from .errors import InputError
from .single_image import ordered_norms

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""By how much two passes of equal shape may differ, as a share of the largest logit."""
_EXPECTED = "a classifier must answer with floating-point logits [B, K], K >= 2"


def suited(model: nn.Module, x: Tensor) -> Tensor:
    """``x`` on the model's device and, floating-point inputs, in its dtype: those of its first such weights."""
    at = next((t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), x)
    return x.to(at.device, at.dtype if x.is_floating_point() else x.dtype)


def answer(model: nn.Module, x: Tensor, *, finite: bool = True) -> Tensor:
    """The logits ``[B, K]`` of ``model`` on ``x``, in a forward pass whose answer is looked at.

    The model gets a copy of ``x``, a part of the graph, so that one that writes into its input does no harm.

    Args:
        model: the classifier.
        x: ``[B, C, H, W]`` or ``[B, D]``.
        finite: whether logits must be; a search that only looks may meet others, and counts them as its failures.

    Raises:
        InputError: the model's answer is no tensor, not floating point, not ``[B, K]`` with ``K >= 2``, or not finite;
            the model changed its input in place, or its graph is cut although ``x`` is differentiated.
    """
    given = x.clone()
    with ordered_norms(model, given):
        logits: object = model(given)
    if _changed(given, x):
        raise in_place(model)
    found = checked(model, logits, x, finite=finite)
    # A model may answer with a buffer of its own, which its next pass overwrites.
    return found if found.requires_grad else found.clone()


def checked(model: nn.Module, logits: object, x: Tensor, *, finite: bool = True) -> Tensor:
    """What ``model`` answered on ``x``, if it is finite logits ``[B, K]``, ``K >= 2``.

    Raises:
        InputError: otherwise, with the model's fault.
    """
    if not isinstance(logits, Tensor):
        raise InputError(_no_tensor(model, logits))
    fault = _fault_of_form(logits, len(x))
    if fault:
        raise InputError(f"{_EXPECTED}; this {type(model).__name__} {fault}")
    if torch.is_grad_enabled() and x.requires_grad and not logits.requires_grad:
        raise InputError(
            f"the logits of this {type(model).__name__} carry no gradient to the input: its graph is cut (no_grad, "
            "inference_mode, detach, NumPy or integers inside). Take a method that only evaluates the model, with an x "
            "that needs no gradient: Occlusion, RISE, LIME or KernelSHAP, and attacks such as Square or NES"
        )
    bad = checks.not_finite(logits) if finite else 0
    if bad and not bool(x.isfinite().all()):
        raise InputError(
            f"this {type(model).__name__} was given NaN or infinity, and answers with it: look for it in x, or, "
            "where inputs are made by gradient steps, in the gradient of the model"
        )
    if bad:
        raise InputError(
            f"this {type(model).__name__} answers with NaN or infinite logits on {bad} of {len(x)} samples: a "
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


class _Admitted:
    """Which models were tried, at level 1 for equal answers, at 2 for mixed samples too; by identity, held weakly."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[nn.Module], int]] = {}
        self._lock = threading.Lock()

    def level(self, model: nn.Module) -> int:
        known = self._known.get(id(model))
        return known[1] if known is not None and known[0]() is model else 0

    def add(self, model: nn.Module, level: int) -> None:
        key = id(model)
        with self._lock:
            self._known[key] = weakref.ref(model, lambda gone: self._drop(key, gone)), level

    def _drop(self, key: int, gone: weakref.ref[nn.Module]) -> None:
        # Without the lock, which the thread that collects garbage may hold; a new model may have the old one's place.
        known = self._known.get(key)
        if known is not None and known[0] is gone:
            self._known.pop(key, None)


_admitted = _Admitted()


def admit(model: nn.Module, x: Tensor) -> None:
    """Refuse a model whose answer for a sample depends on anything but that sample; tried once for each model object.

    The flags of its parts are looked at in every call (:func:`~robustexplain.checks.evaluating`), its answers by
    :func:`answer`. The first call makes two forward passes, ``[a, a, b, b]`` and ``[a, a, c, c]``; later ones cost
    nothing. It is called by interpreters, systems, attacks and metrics.

    Args:
        model: in eval mode.
        x: inputs that it takes, ``[B, C, H, W]`` or ``[B, D]``; one image is enough, of table rows it takes two.

    Raises:
        InputError: a part in train mode, an answer that is no logits ``[B, K]``; two passes that differ for the same
            input, whatever is beside it, or because of what is beside it.
    """
    checks.evaluating(model)
    # One table row alone has no other to be mixed with, and none can be made up: columns have units and categories.
    level = 1 if x.dim() == 2 and len(x) == 1 else 2
    if _admitted.level(model) >= level or not len(x):
        return
    with torch.no_grad():
        _try(model, x.detach())
    _admitted.add(model, level)


def admit_as(copy: nn.Module, model: nn.Module) -> None:
    """Take a copy that shares the model's layers for tried, if the model was."""
    _admitted.add(copy, _admitted.level(model))


def _try(model: nn.Module, x: Tensor) -> None:
    first, second = (_twice_beside(model, x, other) for other in _neighbours(x))
    drawn = max(_gap(logits[::2], logits[1::2]) for logits in (first, second))
    mixed = _gap(first[:1], second[:1])
    if max(drawn, mixed) <= _TOLERANCE.get(first.dtype, 1e-5):
        return
    again = _twice_beside(model, x, _neighbours(x)[0])
    name, apart = type(model).__name__, max(drawn, mixed)
    if max(drawn, _gap(first[:1], again[:1])) > _TOLERANCE.get(first.dtype, 1e-5):
        raise InputError(
            f"this {name} is not deterministic: two looks at the same input give logits that differ by {apart:.2%}. Is "
            "dropout or noise left on in eval mode (F.dropout without training=self.training)? Switch it off, or draw "
            "it from a generator that the input seeds"
        )
    raise InputError(
        f"this {name} mixes samples: the logits of an input change by {apart:.2%} with what is beside it in the batch. "
        "Does it take the batch's statistics in eval mode (F.batch_norm(training=True), a mean over the batch)? Use "
        "running statistics, or those of each sample"
    )


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two other samples, ``[1, ...]`` each, to stand beside the first one."""
    beside = x[1:2] if len(x) > 1 else x[:1]
    if x.dim() == 2:
        return beside, x[-1:] if len(x) > 2 else x[:1]
    # Of another brightness and contrast, in [0, 1].
    return beside, 0.3 * (1 - beside)


def _twice_beside(model: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """Logits ``[4, K]`` of the first sample, twice, and of another one, twice, whose own may be anything.

    Twice, because two draws of dropout on few units are often equal; six hardly ever are.
    """
    together = torch.cat([x[:1], x[:1], other, other])
    given = together.clone()
    logits: object = model(given)
    # Values that are written through ``.data`` leave the version counter as it was.
    if not torch.equal(given, together):
        raise in_place(model)
    logits = checked(model, logits, together, finite=False).clone()
    checked(model, logits[:1], x[:1])
    return logits


def _gap(first: Tensor, second: Tensor) -> float:
    """The largest difference, as a share of the largest logit; rows that are not finite are left out."""
    fine = first.isfinite().all(1) & second.isfinite().all(1)
    a, b = first[fine].double(), second[fine].double()
    largest = torch.cat([a, b]).abs().amax() if len(a) else a.new_ones(())
    return float((a - b).abs().amax() / largest.clamp(min=1e-300)) if len(a) else 0.0
