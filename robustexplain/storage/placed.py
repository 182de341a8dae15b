"""What stands around a model that is handed in on loading: transforms and votes, of which its weights say nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..models.classifier import Classifier, ModelSpec
from ..models.rebuilding import describe, rebuild

Chain = list[dict[str, Any]]
"""Registered names and settings, from the outside in; an inner module of a part of its own is described by its spec."""


def chain_of(model: nn.Module) -> Chain:
    """What stands around a model, until the first module that no registered part puts there."""
    if isinstance(model, Classifier):
        names = list(model.transform_names)
        return [{"name": "classifier", "options": {"transforms": names}}] if names else []
    placed = getattr(model, "placed", None)
    if not isinstance(placed, ModelSpec):
        return []
    options = {key: _plain(value) for key, value in placed.options.items() if key != "model"}
    return [{"name": placed.name, "options": options}, *chain_of(placed.options["model"])]


def as_stored(model: nn.Module, stored: Chain, tensors: dict[str, Tensor], source: str) -> nn.Module:
    """The model that was handed in, with what stood around the saved one.

    Args:
        model: itself, or without some or all of what stood around it, the outermost first.
        stored: the saved one's chain.
        tensors: the saved one's state dict, for networks in the chain.
        source: of both, for messages.

    Raises:
        InputError: something else stands around it.
    """
    found = chain_of(model)
    missing = stored[: len(stored) - len(found)]
    if [*missing, *found] != stored:
        raise InputError(
            f"around the model that was handed in stands {_said(found)}, and around the saved one in {source!r} "
            f"{_said(stored)}: hand in the model without anything around it, which is then put there as it was"
        )
    inner = set(model.state_dict())
    for entry in reversed(missing):
        model = _put_around(model, entry)
        inner = {f"model.{key}" if entry["name"] != "classifier" else key for key in inner}
    if missing:
        added = {key: tensors[key] for key in model.state_dict().keys() - inner if key in tensors}
        # Assigned, so that their precision is kept.
        model.load_state_dict(added, strict=False, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in inner)
    return model


def _put_around(model: nn.Module, entry: dict[str, Any]) -> nn.Module:
    if entry["name"] != "classifier":
        return rebuild({"name": entry["name"], "options": {**entry["options"], "model": model}})
    if not isinstance(model, Classifier):
        raise InputError(f"the saved model is a Classifier with transforms, got {type(model).__name__}")
    return model.with_transforms(entry["options"]["transforms"])


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return _network(value)
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _network(module: nn.Module) -> dict[str, Any]:
    """As :func:`describe`; by its class alone where no builder makes it, which then cannot be put there again."""
    try:
        return describe(module)
    except InputError:
        return {"class": type(module).__name__}


def _said(chain: Chain) -> str:
    """Such as ``voted(transform='resize-pad-3', draws=30) and transformed(transforms=['jpeg-75'])``."""
    each = (f"{e['name']}({', '.join(f'{k}={v!r:.80}' for k, v in e['options'].items())})" for e in chain)
    return " and ".join(each) or "nothing"
