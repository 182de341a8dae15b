"""INT: class activation maps that stay where they are under attack."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import maximised
from robustexplain.autograd.layers import PooledHead, captured, head_weight, pooled_head
from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Fraction, NonNegative
from robustexplain.interpreters.base import usable_by_autograd
from robustexplain.registry import DEFENSES
from robustexplain.training import TrainingStep, eval_mode

from .fine_tuned import FineTuned, refuse_no_room
from .loss_module import HardeningLoss


@DEFENSES.register("int", paper="Boopathy et al. 2020", needs=("data", "pooled linear head"))
@dataclass(frozen=True)
class InterpretabilityTraining(FineTuned):
    """Fine-tune the classifier on ``CE + weight * D``, with ``D`` the L1 discrepancy of its CAMs at ``x`` and ``x'``.

    ``D = |m_y(x') - m_y(x)|_1 + sum_{c != y} w_c |m_c(x') - m_c(x)|_1``, summed over the cells of the CAM's own grid,
    with ``w`` the probabilities of the other classes at ``x'``, normalised without ``y`` (Boopathy et al. 2020, as in
    their code). No term has its gradient stopped. ``x'`` maximises the same loss. A step of the inner attack takes one
    forward and backward pass, the update one of two inputs.

    The paper's names: INT is the default; INT-one-class ``classes: label``; Int-Adv ``task: attacked``; INT2 and
    Int2-Adv ``inner: prediction`` with the one and the other ``task``.

    Departures: the CAM is that of the last feature map behind its activation (the code's stands before it); the inner
    attack begins at random, since ``D`` has no gradient at ``x``, its step shrinks with the radius while that rises,
    and it returns its best iterate; training begins with the system's weights (CIFAR-10 in the paper: 200 epochs from
    random ones, batches of 128, learning rate 1e-3, then 1e-4 and 1e-5).

    Args:
        weight: of the discrepancy; 0.01 in the paper.
        task: whose cross-entropy: of the ``clean`` inputs, or of the ``attacked`` ones.
        inner: what ``x'`` maximises: the whole ``loss``, or the cross-entropy of its ``prediction`` alone.
        classes: whose CAMs: ``all``, or that of the ``label``.
        attack: by default the paper's for CIFAR-10: 10 steps of 2/255 in a ball of 8/255.
        ramp: shares of the training at which the radius begins to rise from 0, and at which it is full; as in the
            paper's training on CIFAR-10.

    Raises:
        FieldError: an ``eps`` of 0; a ramp that ends before it begins; an attack on the discrepancy alone that does not
            begin at random.
        UnsupportedModelError: a network whose logits are no linear layer on averaged features.
    """

    weight: NonNegative = 0.01
    task: Literal["clean", "attacked"] = "clean"
    inner: Literal["loss", "prediction"] = "loss"
    classes: Literal["all", "label"] = "all"
    attack: PGD = field(default_factory=lambda: PGD(8 / 255, steps=10, step_size=2 / 255, random_start=True))
    ramp: tuple[Fraction, Fraction] = (0.06, 0.9)

    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ramp", tuple(self.ramp))
        name = type(self).__name__
        if len(self.ramp) != 2 or not 0 <= self.ramp[0] <= self.ramp[1] <= 1:
            raise FieldError(name, "ramp", f"must be two rising shares, got {self.ramp!r}")
        if self.inner == "loss" and self.task == "clean" and not self.attack.random_start:
            raise FieldError(name, "attack.random_start", "must be on: the discrepancy has no gradient at x itself")
        refuse_no_room(self, self.attack, "attack")

    def risen(self, progress: float) -> float:
        """The share of the radius at ``progress`` in ``[0, 1]``."""
        start, full = self.ramp
        return 1.0 if progress >= full else max(0.0, (progress - start) / (full - start)) if progress > start else 0.0

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return DiscrepancyLoss(network, self, pooled_head(network, x))


@dataclass(frozen=True)
class DiscrepancyLoss(HardeningLoss):
    """``CE + weight * D``.

    Args:
        settings: the defense.
        head: the layers of the CAM.
    """

    settings: InterpretabilityTraining
    head: PooledHead

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """``x'`` ``[b, ...]``; ``x`` itself before the radius rises."""
        settings, network = self.settings, self.network
        share = settings.risen(step.progress)
        if not share:
            return (x,)
        attack = replace(settings.attack, eps=share * settings.attack.eps, step_size=share * settings.attack.step_size)
        with captured(network, [self.head.features.name]) as outputs:
            with torch.no_grad(), eval_mode(network):
                answer(network, x)
                benign = self.maps(network, outputs)

            def reached(network: nn.Module, moved: Tensor, logits: Tensor) -> Tensor:
                return self.inner(self.maps(network, outputs), benign, logits, y)

            return (maximised(attack, network, reached, x, y, step, sloped=False),)

    def inner(self, maps: Tensor, benign: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """What ``x'`` maximises, ``[b]``."""
        settings = self.settings
        task = F.cross_entropy(logits, y, reduction="none")
        if settings.inner == "prediction":
            return task
        found = self.discrepancy(maps, benign, logits, y)
        return found if settings.task == "clean" else task + settings.weight * found

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss, from one pass of ``x`` and ``x'``."""
        with captured(network, [self.head.features.name]) as outputs:
            clean, attacked = answer(network, torch.cat([x, others[0]])).chunk(2)
            benign, maps = self.maps(network, outputs).chunk(2)
        task = self.task(clean if self.settings.task == "clean" else attacked, y)
        return task + self.settings.weight * self.discrepancy(maps, benign, attacked, y)

    def maps(self, network: nn.Module, outputs: dict[str, Tensor]) -> Tensor:
        """The CAM of every class, ``[b, K, h, w]``."""
        features = usable_by_autograd(outputs[self.head.features.name])
        return torch.einsum("kc,bchw->bkhw", head_weight(network, self.head).to(features.dtype), features)

    def discrepancy(self, maps: Tensor, benign: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """``D``, ``[b]``, of CAMs ``[b, K, h, w]`` at ``x'`` and at ``x``, and logits at ``x'``."""
        moved = (maps - benign).abs().flatten(2).sum(2)
        label = F.one_hot(y, logits.shape[1]).bool()
        own = moved[label]
        if self.settings.classes == "label":
            return own
        others = logits.masked_fill(label, -torch.inf).softmax(1)
        return own + (others * moved).sum(1)
