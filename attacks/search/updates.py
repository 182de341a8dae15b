"""One step of a search along a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.fields import Fraction, NonNegative, Positive, check_fields
from robustexplain.objectives import Weight, at
from robustexplain.rounding import wide

Memory = tuple[Tensor, ...]
"""What an update carries from step to step: tensors whose first dimension is the batch."""


@dataclass(frozen=True)
class Update(ABC):
    """One step of a search along a gradient."""

    def __post_init__(self) -> None:
        check_fields(self)

    def begin(self, variable: Tensor) -> Memory:
        """The memory before the first step; empty for most updates."""
        return ()

    @abstractmethod
    def __call__(self, variable: Tensor, gradient: Tensor, progress: float, memory: Memory) -> tuple[Tensor, Memory]:
        """The variable after the step, before projection, and the memory for the next step."""


@dataclass(frozen=True)
class SignStep(Update):
    """``v - size * sign(g)`` (Madry et al. 2018; Zhang et al. 2020, eq. 4)."""

    size: Weight = 1 / 255

    def __call__(self, variable: Tensor, gradient: Tensor, progress: float, memory: Memory) -> tuple[Tensor, Memory]:
        """One sign step."""
        return torch.sub(variable, gradient.sign(), alpha=at(self.size, progress)), memory


@dataclass(frozen=True)
class NormalisedStep(Update):
    """``v - size * g / ||g||_2`` per sample: the step of the L2 ball."""

    size: Weight = 0.1

    def __call__(self, variable: Tensor, gradient: Tensor, progress: float, memory: Memory) -> tuple[Tensor, Memory]:
        """One step of length ``size``."""
        gradient = wide(gradient)
        norm = ops.expand(gradient.flatten(1).norm(dim=1), gradient)
        return variable - at(self.size, progress) * gradient / norm.clamp(min=1e-12), memory


@dataclass(frozen=True)
class MomentumStep(Update):
    """A step along ``m <- decay m + g / ||g||_1`` (Dong et al. 2018, eq. 6-7), by sign or at unit L2 length.

    Args:
        size: of one step.
        decay: ``mu``; 0 is the step without momentum.
        sign: step by ``sign(m)``; otherwise along ``m / ||m||_2``.
    """

    size: Weight = 1 / 255
    decay: NonNegative = 1.0
    sign: bool = True

    def begin(self, variable: Tensor) -> Memory:
        """No momentum yet."""
        return (wide(variable.new_zeros(variable.shape)),)

    def __call__(self, variable: Tensor, gradient: Tensor, progress: float, memory: Memory) -> tuple[Tensor, Memory]:
        """One step along the momentum."""
        gradient = wide(gradient)
        norm = ops.expand(gradient.flatten(1).abs().sum(1), gradient)
        momentum = self.decay * memory[0] + gradient / norm.clamp(min=1e-12)
        step = SignStep(self.size) if self.sign else NormalisedStep(self.size)
        return step(variable, momentum, progress, ())[0], (momentum,)


@dataclass(frozen=True)
class Adam(Update):
    """Adam (Kingma and Ba 2015) with separate moments for each sample.

    Args:
        lr: learning rate, in units of the variable.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
    """

    lr: Weight = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8

    def begin(self, variable: Tensor) -> Memory:
        """Both moments and the step count zero; the count is per sample, so that it can be selected with it."""
        zeros = wide(variable.new_zeros(variable.shape))
        return zeros, zeros.clone(), zeros.new_zeros(len(variable))

    def __call__(self, variable: Tensor, gradient: Tensor, progress: float, memory: Memory) -> tuple[Tensor, Memory]:
        """One step of Adam."""
        count, gradient = memory[2] + 1, wide(gradient)
        first = self.beta1 * memory[0] + (1 - self.beta1) * gradient
        second = self.beta2 * memory[1] + (1 - self.beta2) * gradient.square()
        mean = first / ops.expand(1 - self.beta1**count, first)
        variance = second / ops.expand(1 - self.beta2**count, second)
        return variable - at(self.lr, progress) * mean / (variance.sqrt() + self.epsilon), (first, second, count)
