"""Saliency-guided training: the prediction must not depend on the pixels with the smallest gradients; ASGT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import attacked
from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Fraction, NonNegative
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.training import Training, TrainingStep, eval_mode, frozen
from robustexplain.training.losses import right

from .distances import divergence
from .fine_tuned import FineTuned, Norms, refuse_no_room
from .input_gradients import classified, gradient, score
from .loss_module import HardeningLoss


@DEFENSES.register("saliency-guided", paper="Ismail et al. 2021, eq. 1 and Algorithm 1", needs=("gradients", "data"))
@dataclass(frozen=True)
class SaliencyGuided(FineTuned):
    """Fine-tune the classifier so that its answer stays the same without the pixels of the smallest gradients.

    The loss of a sample is ``CE(x) + weight * KL(p(x) || p(masked x))``; in ``masked x`` the ``share`` of pixels with
    the smallest gradient of the label's logit, on the current weights, are uniform noise in the range of the input's
    own values. No second derivative is taken.

    Departures: magnitudes of gradients decide, as in the paper's text; in its code an option, signed gradients by
    default. A pixel is masked in all of its channels. The paper trains from the start (MNIST: 100 epochs of Adadelta).

    Args:
        share: of the pixels that are masked; the paper's 0.5 for MNIST and CIFAR-10.
        weight: ``lambda``.
        training: epochs, batch, optimiser.
        norms: ``train`` by default, as in the code.
    """

    share: Fraction = 0.5
    weight: NonNegative = 1.0
    norms: Norms = "train"

    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise FieldError(type(self).__name__, "share", f"must be above 0 and below 1, got {self.share!r}")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return SaliencyGuidedLoss(network, self.share, self.weight)


@DEFENSES.register("asgt", paper="Adversarial saliency-guided training, arXiv 2405.06278, and code", needs=("data",))
@dataclass(frozen=True)
class AdversarialSaliencyGuided(FineTuned):
    """Fine-tune the classifier on PGD's inputs too, and on these without the pixels of their smallest gradients (ASGT).

    The loss of a sample is ``CE(x) + CE(x') + weight * KL(p(x) || p(masked x'))``, with ``x'`` PGD's input against the
    current weights and the mask that of :class:`SaliencyGuided` at ``x'``.

    Departures: the divergence is as in the papers (the code has its arguments the other way round); PGD makes 30 steps
    (in the code's own PGD a single one); noise fills the range of the input's own values; a pixel's size is the mean of
    its channels' magnitudes (in the code the magnitude of their mean, in which channels of unlike sign cancel).

    Args:
        attack: PGD in training.
        share: of the pixels that are masked.
        weight: ``lambda``.
        training: epochs, batch, optimiser.
        norms: ``train`` by default, as in the code.
    """

    attack: PGD = field(default_factory=lambda: PGD(0.025, steps=30, step_size=0.0025))
    share: Fraction = 0.1
    weight: NonNegative = 1.0
    training: Training = field(
        default_factory=lambda: Training(epochs=10, lr=1e-3, weight_decay=0.0, schedule="constant")
    )
    norms: Norms = "train"

    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_room(self, self.attack, "attack")
        if not 0 < self.share < 1:
            raise FieldError(type(self).__name__, "share", f"must be above 0 and below 1, got {self.share!r}")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return SaliencyGuidedLoss(network, self.share, self.weight, self.attack)


@dataclass(frozen=True)
class SaliencyGuidedLoss(HardeningLoss):
    """``CE(x) [+ CE(x')] + weight * KL(p(x) || p(masked))`` of each sample; masked is ``x``, or the attacked ``x'``.

    Args:
        share: of the pixels that are masked.
        weight: of the divergence.
        attack: PGD in training.
    """

    share: float
    weight: float
    attack: PGD | None = None

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """The attacked inputs, if there is an attack, and the masked ones."""
        moved = () if self.attack is None else (attacked(self.attack, self.network, x, y, step),)
        streams = Streams.of(x, step.seed, "saliency", step.epoch)
        return *moved, masked(self.network, (x, *moved)[-1], y, self.share, streams)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """As the class says."""
        logits, *rest = network(torch.cat([x, *others])).chunk(1 + len(others))
        task = sum((self.task(found, y) for found in rest[:-1]), self.task(logits, y))
        return task + self.weight * divergence(logits, rest[-1])

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy`` and, with an attack, ``robust_accuracy`` on attacked inputs."""
        found = super().figures(module, x, y, step)
        if self.attack is None:
            return found
        moved = attacked(self.attack, self.network, x, y, step)
        return found | {"robust_accuracy": right(answer(module, moved, finite=False), y)}


def masked(network: nn.Module, x: Tensor, y: Tensor, share: float, streams: Streams) -> Tensor:
    """Inputs ``[b, ...]`` whose pixels of the smallest gradients are noise in the range of the input's own values.

    Args:
        network: in training; its gradients are taken in eval mode.
        x: the inputs.
        y: the classes whose logit is differentiated.
        share: of the pixels.
        streams: the random streams of the inputs.
    """
    with torch.enable_grad(), eval_mode(network), frozen(network):
        given, logits = classified(network, x)
        slope = gradient(score(logits, y, "label"), given, graph=False).detach()
    size = slope.abs().mean(1).flatten(1) if slope.dim() == 4 else slope.abs().flatten(1)
    lowest = size.argsort(dim=1, stable=True)[:, : int(share * size.shape[1])]
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter(1, lowest, True)
    chosen = chosen.unflatten(1, x.shape[2:])[:, None].expand_as(x) if x.dim() == 4 else chosen
    flat = x.flatten(1)
    low, high = (edge.reshape(-1, *[1] * (x.dim() - 1)) for edge in (flat.amin(1), flat.amax(1)))
    return torch.where(chosen, low + streams.uniform(x) * (high - low), x)
