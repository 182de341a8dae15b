"""Relative stability: the map's relative change per relative change of the input, the output or a representation.

Quantus differs in two ways: it gives NaN as soon as one neighbour changes the prediction, where the definition leaves
that neighbour out, and it floors the denominator only where it is exactly zero.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..autograd import layers
from ..fields import Positive
from ..registry import METRICS
from .stability import Explanations, Stability, norm

if TYPE_CHECKING:
    from ..interpreters.base import Interpreter


def _relative(before: Tensor, after: Tensor, eps: float) -> Tensor:
    # Norm of the change as a share of each value; eps replaces a zero, as in Quantus.
    return norm((after - before).div_(torch.where(before == 0, eps, before)))


@dataclass(frozen=True)
class RelativeStability(Stability):
    """The map's relative change over the change of a quantity that the subclass names; same prediction."""

    eps: Positive = 1e-6

    kept_prediction: ClassVar[bool] = True

    def _moved(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        below = self._below(center, around, layer).clamp(min=self.eps)
        return _relative(center.maps, around.maps, self.eps) / below

    @abstractmethod
    def _below(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        """The denominator, ``[n]``."""


@METRICS.register("relative-input-stability", paper="Agarwal et al. 2022 (RIS)", needs=("interpreter",))
@dataclass(frozen=True)
class RelativeInputStability(RelativeStability):
    """Largest relative change of the map per relative change of the input, prediction kept (RIS); low is stable.

    Args:
        radius: half-width of uniform noise, standard deviation of Gaussian noise.
        noise: how neighbours are drawn (the paper: Gaussian, 0.05).
        samples: how many.
        seed: of the draws.
        batch_size: largest batch the interpreter sees.
        eps: floor of the denominator, and what a value of 0 counts as when something is divided by it.
    """

    def _below(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        return _relative(center.x, around.x, self.eps)


@METRICS.register("relative-output-stability", paper="Agarwal et al. 2022 (ROS)", needs=("interpreter",))
@dataclass(frozen=True)
class RelativeOutputStability(RelativeStability):
    """Largest relative change of the map per change of the logits, prediction kept (ROS); low is stable.

    Args:
        radius: half-width of uniform noise, standard deviation of Gaussian noise.
        noise: how neighbours are drawn (the paper: Gaussian, 0.05).
        samples: how many.
        seed: of the draws.
        batch_size: largest batch the interpreter sees.
        eps: floor of the denominator, and what a map's value of 0 counts as when something is divided by it.
    """

    def _below(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        return norm(around.logits - center.logits)


@METRICS.register("relative-representation-stability", paper="Agarwal et al. 2022 (RRS)", needs=("interpreter",))
@dataclass(frozen=True)
class RelativeRepresentationStability(RelativeStability):
    """Largest relative change of the map per relative change of a layer's output, prediction kept (RRS); low is stable.

    Args:
        radius: half-width of uniform noise, standard deviation of Gaussian noise.
        noise: how neighbours are drawn (the paper: Gaussian, 0.05).
        samples: how many.
        seed: of the draws.
        batch_size: largest batch the interpreter sees.
        eps: floor of the denominator, and what a value of 0 counts as when something is divided by it.
        layer: the layer's dotted name; empty is the last feature map.
    """

    layer: str = ""

    def _layer(self, interpreter: Interpreter, x: Tensor) -> str | None:
        return self.layer or layers.last_feature_layer(interpreter.model, x).name

    def _below(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        assert layer is not None  # this class always has one; for the type checker
        return _relative(center.features[layer], around.features[layer], self.eps)
