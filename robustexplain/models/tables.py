"""Networks for tables, with the standardisation of the columns folded in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..registry import MODELS
from .classifier import ModelSpec

Activation = Literal["softplus", "relu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"softplus": nn.Softplus, "relu": nn.ReLU}


class TableClassifier(nn.Module):
    """A network with its own standardisation folded in: ``logits = net((x - mean) / std)``.

    ``mean`` and ``std``, ``[1, D]``, are buffers of the state dict, so that a saved classifier keeps the
    standardisation it was trained with. They start as 0 and 1; :meth:`standardise` sets them.

    Args:
        net: takes standardised rows ``[B, D]``, gives logits ``[B, K]``.
        num_classes: K.
        in_features: D.
        spec: how to rebuild the architecture; ``None`` for a network that ``build`` does not know.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, num_classes: int, in_features: int, spec: ModelSpec | None = None) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.num_classes = num_classes
        self.in_features = in_features
        # What asks a classifier for the side of its images gets an answer.
        self.input_size: int | None = None
        self.register_buffer("mean", torch.zeros(1, in_features, dtype=torch.float32))
        self.register_buffer("std", torch.ones(1, in_features, dtype=torch.float32))

    @torch.no_grad()
    def standardise(self, x: Tensor) -> TableClassifier:
        """Take mean and standard deviation (over N, as scikit-learn's StandardScaler) of the columns of ``x``.

        A constant column gets a standard deviation of 1. Weights stay as they are: standardise before training.

        Args:
            x: rows ``[N, D]``, those that train.

        Raises:
            InputError: for rows of another shape, none, or not finite.
        """
        self._check(x)
        if not len(x) or not torch.isfinite(x).all():
            raise InputError(f"x must hold finite rows to standardise by, got shape {list(x.shape)}")
        exact = x.double()
        constant = exact.amin(0) == exact.amax(0)
        self.mean.copy_(exact.mean(0, keepdim=True))
        self.std.copy_(torch.where(constant, 1.0, exact.std(0, correction=0))[None])
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of rows ``[B, D]`` in the data's own units.

        Raises:
            InputError: for a wrong number of dimensions or columns.
        """
        # torch.fx traces with proxies, which are no tensors: the check must leave no trace in a graph.
        if isinstance(x, Tensor):
            self._check(x)
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.in_features:
            name = self.spec.name if self.spec else type(self.net).__name__
            raise InputError(
                f"x must have shape [B, {self.in_features}], the columns that {name} takes, got {list(x.shape)}"
            )


@MODELS.register("mlp")
def mlp(
    num_classes: int = 2,
    in_features: int = 2,
    hidden: Sequence[int] = (64, 64),
    activation: Activation = "softplus",
) -> TableClassifier:
    """A fully connected network for tables; softplus by default, since maps of rectifiers have no derivative.

    Args:
        num_classes: K.
        in_features: D, the columns of the table.
        hidden: widths of the hidden layers.
        activation: ``softplus`` or ``relu``.

    Raises:
        InputError: for a width below 1, no hidden layer, or an unknown activation.
    """
    if not hidden or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in hidden):
        raise InputError(f"hidden must hold widths of at least 1, got {hidden!r}; without any, use model 'linear'")
    if activation not in _ACTIVATIONS:
        raise InputError(f"activation must be one of {list(_ACTIVATIONS)}, got {activation!r}")
    widths = [in_features, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), _ACTIVATIONS[activation]()]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
    return TableClassifier(net, num_classes, in_features)


@MODELS.register("linear")
def linear(num_classes: int = 2, in_features: int = 2) -> TableClassifier:
    """Logistic regression on standardised columns: one linear layer.

    Args:
        num_classes: K.
        in_features: D, the columns of the table.
    """
    return TableClassifier(nn.Linear(in_features, num_classes), num_classes, in_features)
