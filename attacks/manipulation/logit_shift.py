"""One number added to every logit of an input: the softmax stays the same, the gradients of the logits change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustexplain.autograd import layers


class CommonShift(nn.Module):
    """A weight ``W [K, D]`` whose rows all move by one vector ``u [D]``: ``W + 1 u^T``.

    Each of the ``K`` logits of an input with features ``a`` moves by ``u^T a``, so their softmax does not change. The
    gradient of every logit moves by that of ``u^T a``: explanations of logits can be manipulated without a change of
    the probabilities (Srinivas and Fleuret 2021, arXiv:2006.09128).

    Args:
        weight: gives size, dtype and device.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(weight[:1]))

    def forward(self, weight: Tensor) -> Tensor:
        """``[K, D]``."""
        return weight + self.shift


@contextmanager
def shifted(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within the block the rows of the last linear layer share a trainable shift; afterwards it is part of the weight.

    Args:
        model: changed in place.
        x: ``[B, ...]``, any inputs; the first is used to find the layer that gives the logits.

    Raises:
        UnsupportedModelError: no linear layer gives the logits.
    """
    layer = layers.submodule(model, layers.logit_layer(model, x))
    assert isinstance(layer.weight, Tensor)  # a linear layer's; for the type checker
    parametrize.register_parametrization(layer, "weight", CommonShift(layer.weight))
    # torch makes its container in train mode, whatever the layer is in.
    layer.get_submodule("parametrizations").train(layer.training)
    try:
        yield
    finally:
        parametrize.remove_parametrizations(layer, "weight")
        if "bias" in layer._parameters:
            # The weight was registered again, after the bias; saved files and optimisers depend on the order.
            layer.register_parameter("bias", layer._parameters.pop("bias"))
