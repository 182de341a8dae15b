"""ATEX: stable maps by first-order training on points along and across the direction of the explanation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Count, Eps, Positive
from robustexplain.maps import expand
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.training import Training, TrainingStep, eval_mode, frozen

from .fine_tuned import FineTuned
from .input_gradients import classified, gradient, score
from .loss_module import HardeningLoss


@DEFENSES.register("atex", paper="Tang et al. 2022 and code (ATEX)", needs=("gradients", "data"))
@dataclass(frozen=True)
class ATEX(FineTuned):
    """Fine-tune the classifier so that its answer changes along its explanation and stands still across it.

    The explanation ``g`` is SmoothGrad of the label's logit on the current weights. A point lies at one of
    ``positions`` along ``g`` and is moved by noise that is orthogonal to ``g``; its target is the answer that the
    classifier as it was gives at the position before it was moved, at a ``temperature``. The loss of a sample is the
    mean divergence of these answers from the targets. There is no cross-entropy of the label, and no second derivative.

    Departures: an optimiser step takes ``draws`` points, each at a position of its own, where the code makes a step for
    each of 11 positions, twice, with one explanation for all 22; ``training.epochs`` is therefore 44 by default instead
    of 2. Positions are symmetric, from -1/2 to 1/2 (the code's go from -0.55 to 0.45), the divergence is a sum over
    classes (a mean in the code), and points stay in ``[0, 1]``.

    Args:
        eps: standard deviation of SmoothGrad's noise.
        reach: largest magnitude of a change along the explanation, from end to end, and of the noise across it.
        positions: along the explanation.
        draws: points of each input in a step.
        samples: noisy copies of SmoothGrad; each costs a forward and a backward pass.
        temperature: of the classifier as it was.
        training: epochs, batch, optimiser.
    """

    eps: Eps = 0.02
    reach: Eps = 0.08
    positions: Count = 11
    draws: Count = 8
    samples: Count = 10
    temperature: Positive = 4.0
    training: Training = field(
        default_factory=lambda: Training(
            epochs=44, batch_size=100, lr=1.5e-3, weight_decay=0.0, schedule="constant", clip=0.0
        )
    )

    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "reach"):
            if getattr(self, name) == 0:
                raise FieldError(type(self).__name__, name, "must be above 0: no other input is learned from")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        teacher = copy.deepcopy(network).requires_grad_(False).eval()
        return ATEXLoss(network, self, teacher)


@dataclass(frozen=True)
class ATEXLoss(HardeningLoss):
    """Mean divergence over points of the answers from those of the classifier as it was.

    Args:
        settings: the defense.
        teacher: the classifier as it was.
    """

    settings: ATEX
    teacher: nn.Module

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """Points ``[b * draws, ...]`` and the teacher's probabilities ``[b * draws, K]`` before they were moved."""
        settings = self.settings
        streams = Streams.of(x, step.seed, "atex", step.epoch)
        direction = self.explanation(x, y, streams)
        along, across = [], []
        for _ in range(settings.draws):
            start = (x + self._shift(direction, streams)).clamp(0, 1)
            along.append(start)
            noise = streams.uniform(x, -settings.reach, settings.reach)
            across.append((start + noise - component(noise, direction)).clamp(0, 1))
        with torch.no_grad():
            known = answer(self.teacher, torch.stack(along, 1).flatten(0, 1)) / settings.temperature
        return torch.stack(across, 1).flatten(0, 1), known.softmax(1)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """As the class says."""
        points, known = others
        # No label has a part in it, so that its smoothing has none either.
        divergence = F.kl_div(network(points).log_softmax(1), known, reduction="none").sum(1)
        mean: Tensor = divergence.unflatten(0, (len(x), -1)).mean(1)
        return mean

    def explanation(self, x: Tensor, y: Tensor, streams: Streams) -> Tensor:
        """SmoothGrad of the label's logit, ``[b, ...]``, detached."""
        total = torch.zeros_like(x)
        with torch.enable_grad(), eval_mode(self.network), frozen(self.network):
            for _ in range(self.settings.samples):
                noisy = (x + self.settings.eps * streams.normal(x)).clamp(0, 1)
                given, logits = classified(self.network, noisy)
                total = total + gradient(score(logits, y, "label"), given, graph=False).detach()
        return total / self.settings.samples

    def _shift(self, direction: Tensor, streams: Streams) -> Tensor:
        """A position along the direction, whose largest entry becomes ``reach``."""
        count = self.settings.positions
        place = streams.integers(count).to(direction) / max(count - 1, 1) - (0.5 if count > 1 else 0)
        largest = direction.flatten(1).abs().amax(1).clamp(min=torch.finfo(direction.dtype).tiny)
        return direction * expand(self.settings.reach * place / largest, direction)


def component(noise: Tensor, direction: Tensor) -> Tensor:
    """The part of the noise along the direction, each channel by itself, as in the code."""
    axes = tuple(range(2, noise.dim())) or (1,)
    size = direction.square().sum(axes, keepdim=True).clamp(min=torch.finfo(noise.dtype).tiny)
    return direction * ((noise * direction).sum(axes, keepdim=True) / size)
