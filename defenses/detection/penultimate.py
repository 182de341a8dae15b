"""The units in front of the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robustexplain.autograd.hooks import hooks
from robustexplain.autograd.layers import submodule
from robustexplain.door import answer
from robustexplain.errors import UnsupportedModelError
from robustexplain.hidden import refuse_hidden


def penultimate(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input ``[B, U]`` of the linear layer that gives the logits, and the logits ``[B, K]``.

    Raises:
        UnknownNameError: no such layer.
        UnsupportedModelError: it does not run, or on other than one row an input; a model that cannot be seen.
    """
    refuse_hidden(model, "the input of a layer is read")
    given: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(args[0])

    with hooks([submodule(model, layer)], before=keep):
        logits = answer(model, x)
    if len(given) != 1 or given[0].dim() != 2 or len(given[0]) != len(x):
        raise UnsupportedModelError(f"layer {layer!r} of {type(model).__name__} does not run once, on a row an input")
    return given[0], logits
