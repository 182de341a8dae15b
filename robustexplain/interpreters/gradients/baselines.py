"""Baselines of inputs and units of noise, in the units of the input or of the model's normalisation.

Each column of a table has its own unit, so one number rarely suits all columns. A model that standardises its input
provides usual values: its ``mean`` and ``std``, as :class:`robustexplain.models.Classifier` keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import FieldError, InputError, UnsupportedModelError
from ...fields import Fraction

Baseline = Fraction | Literal["mean"] | tuple[float, ...]
"""One number for all channels or columns, ``"mean"`` of the model's own normalisation, or a number for each of them."""
Units = Literal["input", "model"]
"""The input's own units, or standard deviations of the model's own normalisation."""


def checked_baseline(component: object, value: object) -> Baseline:
    """The baseline, checked, with the numbers of a sequence as floats.

    Raises:
        FieldError: another word, a number outside ``[0, 1]``, or one of a sequence that is not finite.
    """
    name = type(component).__name__
    if isinstance(value, str):
        if value != "mean":
            raise FieldError(name, "baseline", f"must be a number, 'mean' or a number for each column, got {value!r}")
        return "mean"
    if isinstance(value, Sequence):
        if not value or not all(_finite(v) for v in value):
            raise FieldError(name, "baseline", f"must hold finite numbers, one for each column, got {value!r}")
        return tuple(float(v) for v in value)
    if not _finite(value):
        raise FieldError(name, "baseline", f"must be a number, 'mean' or a number for each column, got {value!r}")
    assert isinstance(value, (int, float))
    if not 0 <= value <= 1:
        words = "at least 0" if value < 0 else "at most 1"
        raise FieldError(name, "baseline", f"must be {words}, got {value!r}; a table's row is given number by number")
    return value


def baseline_like(baseline: Baseline, model: nn.Module, x: Tensor) -> Tensor:
    """The baseline as one input, ``[1, ...]``, of the shape of those in ``x``.

    Raises:
        InputError: the number of values is not that of the channels or columns of ``x``.
        UnsupportedModelError: ``"mean"`` for a model without one.
    """
    if baseline == "mean":
        return _of_model(model, "mean", x)
    if isinstance(baseline, tuple):
        if len(baseline) != x.shape[1]:
            what = "columns" if x.dim() == 2 else "channels"
            raise InputError(f"the baseline holds {len(baseline)} numbers, but x has {x.shape[1]} {what}")
        values = x.new_tensor(baseline)
        return values.reshape(1, -1, *[1] * (x.dim() - 2)).expand_as(x[:1])
    return torch.full_like(x[:1], baseline)


def deviation(units: Units, model: nn.Module, x: Tensor) -> Tensor | float:
    """One unit of noise: 1, or the standard deviation by which the model divides, ``[1, ...]`` like ``x``.

    Raises:
        UnsupportedModelError: ``"model"`` for a model that has none.
    """
    return 1.0 if units == "input" else _of_model(model, "std", x)


def _of_model(model: nn.Module, name: Literal["mean", "std"], x: Tensor) -> Tensor:
    values = getattr(model, name, None)
    if not isinstance(values, Tensor):
        raise UnsupportedModelError(
            f"this {type(model).__name__} does not say by which {name} it normalises its input (it has no tensor "
            f"{name!r}): give the values themselves, or use a model of robustexplain.models"
        )
    try:
        return values.detach().to(x.device, x.dtype).expand_as(x[:1])
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"the {name} of this {type(model).__name__} has shape {list(values.shape)}, which does not fit inputs of "
            f"shape {list(x.shape[1:])}"
        ) from error


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
