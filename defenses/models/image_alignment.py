"""ART: the gradient of the label's logit looks like the image, and that of its rival does not."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import maximised
from robustexplain.fields import NonNegative, Positive, check_k
from robustexplain.maps import top_k_count
from robustexplain.registry import DEFENSES
from robustexplain.training import TrainingStep, eval_mode, frozen

from .distances import cosine
from .fine_tuned import FineTuned, refuse_no_room
from .input_gradients import classified, gradient, score
from .loss_module import HardeningLoss


@DEFENSES.register("art", paper="Singh et al. 2020", needs=("data",))
@dataclass(frozen=True)
class ImageAlignment(FineTuned):
    """Fine-tune the classifier so that its gradients align with the image: attributional robustness training.

    The loss of a sample is ``CE(x') + weight * log(1 + exp(d_label - d_rival))``: a soft-margin triplet loss (Singh et
    al. 2020) of the cosine distances between an image and the gradients of the label's logit and of the largest other
    one. Of ``x`` and ``x'`` each is compared with the gradients at both, and the farther one of the label and the
    nearer one of the rival count. ``x'`` maximises the triplet loss at ``x'`` alone, restricted to the ``k`` entries
    with the largest gradient of the label at ``x``. A step of it takes one forward pass and two double backwards; the
    update takes the same on two inputs.

    Written from the paper and a reading of what its code computes; that code may not be used commercially, and none of
    it is here. Departures: the cross-entropy is that of the smoothed network as well (the code asks the rectifiers in
    a second pass); the ``k`` entries are those at ``x``, not at the random start; images are taken less the model's own
    mean, where it says one, and not divided by a deviation; the paper trains from random weights (CIFAR-10: 101 epochs,
    SGD at 0.1, batches of 234).

    Args:
        attack: by default that of the code for CIFAR-10: 3 steps of 5/255 in a ball of 8/255, from a random start.
        softplus: as in :class:`FineTuned`; 50 in the code.
        weight: of the triplet loss.
        k: entries of the inner attack, of all channels: a number, or below 1 a share; 1000 of 3072 in the code.
    """

    attack: PGD = field(default_factory=lambda: PGD(8 / 255, steps=3, step_size=5 / 255, random_start=True))
    softplus: Positive | None = 50.0
    weight: NonNegative = 0.5
    k: Positive = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k)
        refuse_no_room(self, self.attack, "attack")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        mean = getattr(getattr(network, "model", network), "mean", None)
        return TripletLoss(network, self, mean if isinstance(mean, Tensor) else None)


@dataclass(frozen=True)
class TripletLoss(HardeningLoss):
    """``CE(x') + weight * log(1 + exp(d_label - d_rival))``.

    Args:
        settings: the defense.
        mean: the colour that the model's normalisation maps to zero.
    """

    settings: ImageAlignment
    mean: Tensor | None

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """``x'`` ``[b, ...]``."""
        with eval_mode(self.network), frozen(self.network):
            given, logits = classified(self.network, x)
            own = gradient(score(logits, y, "label"), given, graph=False).flatten(1)
        top = own.abs().topk(top_k_count(self.settings.k, own.shape[1]), 1).indices

        def reached(network: nn.Module, moved: Tensor, logits: Tensor) -> Tensor:
            parts = [part.flatten(1).gather(1, top) for part in (self.centred(moved), *rivals(moved, logits, y))]
            return triplet(1 - cosine(parts[0], parts[1]), 1 - cosine(parts[0], parts[2]))

        return (maximised(self.settings.attack, self.network, reached, x, y, step),)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss, from one pass of ``x`` and ``x'``."""
        both, logits = classified(network, torch.cat([x, others[0]]))
        images = self.centred(both.detach()).flatten(1).chunk(2)
        label, rival = (part.flatten(1).chunk(2) for part in rivals(both, logits, torch.cat([y, y])))
        value = torch.zeros_like(logits[: len(x), 0])
        for image in images:
            far = torch.stack([1 - cosine(image, part) for part in label]).amax(0)
            near = torch.stack([1 - cosine(image, part) for part in rival]).amin(0)
            value = value + triplet(far, near) / 2
        return self.task(logits[len(x) :], y) + self.settings.weight * value

    def centred(self, x: Tensor) -> Tensor:
        """The image less the model's mean colour."""
        return x if self.mean is None else x - self.mean.detach().to(x)


def rivals(x: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the label's logit and of the largest other one, like ``x``."""
    return gradient(score(logits, y, "label"), x), gradient(score(logits, y, "runner_up"), x)


def triplet(own: Tensor, other: Tensor) -> Tensor:
    """The soft margin ``log(1 + exp(own - other))`` of two distances."""
    return F.softplus(own - other)
