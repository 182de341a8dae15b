"""A classifier that no registered builder makes, passed on loading: it is compared with the saved one, not changed."""

from __future__ import annotations

import copy
import warnings
from itertools import chain
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError, RobustExplainWarning
from ..models.weights import load_state

Weights: TypeAlias = Literal["same", "stored", "own"]
"""Which weights are deployed with a model that is passed on loading."""


def handed_in(model: nn.Module, stored: dict[str, Tensor], weights: Weights, source: str) -> nn.Module:
    """The model that is deployed: the passed one itself, or a copy of it with the stored weights.

    Args:
        model: left as it is: weights, mode, ``requires_grad``.
        stored: the state dict that was saved.
        weights: ``same`` refuses a model whose weights differ, ``own`` warns, ``stored`` loads them into a copy.
        source: of the stored weights, for messages.

    Raises:
        InputError: weights that differ, or do not fit at all.
    """
    if weights == "stored":
        made = in_precision_of(stored, copy.deepcopy(model))
        load_state(made, stored, source)
        return made.requires_grad_(False).eval()
    own = model.state_dict()
    _check_fit(own, stored, source)
    differing = [key for key, value in stored.items() if not _equal(own[key], value)]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        one, other = own[differing[0]].dtype, stored[differing[0]].dtype
        dtypes = "" if one == other else f" ({one}, stored {other})"
        difference = (
            f"the model that was handed in has other weights than {source!r}: {differing[0]}{more} differ{dtypes}"
        )
        if weights != "own":
            raise InputError(
                f"{difference}. Interpreter and detector were made for the saved ones: load those, into a copy, with "
                "weights='stored'; or go on with your own with weights='own'"
            )
        warnings.warn(f"{difference}; interpreter and detector were made for the saved ones", RobustExplainWarning, 2)
    return model


def in_precision_of(stored: dict[str, Tensor], module: nn.Module) -> nn.Module:
    """The module in the floating-point dtype of the stored tensors, if they have one and are not to be rounded."""
    found = {value.dtype for value in stored.values() if value.is_floating_point()}
    return module.to(found.pop()) if len(found) == 1 else module


def _check_fit(own: dict[str, Tensor], stored: dict[str, Tensor], source: str) -> None:
    missing, more = sorted(stored.keys() - own.keys()), sorted(own.keys() - stored.keys())
    if missing or more:
        raise InputError(
            f"the model that was handed in and the weights of {source!r} do not fit: missing keys: {_some(more)}; "
            f"unexpected keys: {_some(missing)}"
        )
    shapes = [k for k, v in stored.items() if v.shape != own[k].shape and v.dtype != torch.uint8]
    if shapes:
        key = shapes[0]
        raise InputError(
            f"the model that was handed in and the weights of {source!r} do not fit: {key} is "
            f"{list(own[key].shape)}, stored {list(stored[key].shape)}"
        )


def _some(words: list[str], most: int = 8) -> str:
    return (", ".join(words[:most]) or "none") + (f" and {len(words) - most} more" if len(words) > most else "")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach().cpu(), b)


def device_of(model: nn.Module | None) -> torch.device:
    """The device of a model's weights; the CPU without any."""
    tensors = () if model is None else chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
