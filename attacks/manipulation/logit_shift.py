"""One number added to every logit: softmax takes it out again, the gradients of the logits do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustexplain.autograd import layers


class CommonShift(nn.Module):
    """A weight ``W [K, D]`` whose rows all move by one vector ``u [D]``: ``W + 1 u^T``.

    Each of the ``K`` logits of an input with features ``a`` moves by ``u a``, so their softmax stays what it was, while
    the gradient of any logit moves by that of ``u a``: whatever explains logits can be led without touching an output
    (Srinivas and Fleuret 2021, arXiv:2006.09128).

    Args:
        weight: decides size, type and device.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(weight[:1]))

    def forward(self, weight: Tensor) -> Tensor:
        """``[K, D]``."""
        return weight + self.shift


@contextmanager
def shifted(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within the block the rows of the last linear layer can move together; afterwards they are ordinary weights.

    Args:
        model: changed in place.
        x: ``[B, ...]``, any inputs, of which the first shows which layer gives the logits.

    Raises:
        UnsupportedModelError: no linear layer gives the logits.
    """
    layer = layers.submodule(model, layers.logit_layer(model, x))
    assert isinstance(layer.weight, Tensor)  # a linear layer's; for the type checker
    parametrize.register_parametrization(layer, "weight", CommonShift(layer.weight))
    try:
        yield
    finally:
        parametrize.remove_parametrizations(layer, "weight")
        if "bias" in layer._parameters:
            # The weight was registered anew, behind the bias; saved files and optimisers go by the order.
            layer.register_parameter("bias", layer._parameters.pop("bias"))
