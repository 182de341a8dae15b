"""Adversarial explanations: small input gradients at a cost in accuracy that is set, not the weight (Woods et al.)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import attacked
from robustexplain.autograd.rectifiers import require_rectifiers
from robustexplain.data import stack
from robustexplain.door import answer
from robustexplain.fields import Fraction, NonNegative, Positive
from robustexplain.interpreters.base import pick
from robustexplain.maps import expand
from robustexplain.models.half_huber import HalfHuberNetwork
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, TrainingStep

from .fine_tuned import FineTuned, Norms, refuse_no_room
from .input_gradients import classified, gradient, runner_up
from .loss_module import HardeningLoss, LossModule


@DEFENSES.register("woods", paper="Woods, Chen & Teuscher 2019 and code", needs=("gradients", "data"))
@dataclass(frozen=True)
class Woods(FineTuned):
    """Fine-tune the classifier for small input gradients, as small as its cross-entropy allows (Woods et al. 2019).

    The loss of a sample is ``CE + psi * mean |ds/dx|^2``, the mean over pixels and channels. ``s`` is the logit of a
    random class or, with chance ``tandem``, that of the label less the largest other one. A controller raises ``psi =
    psi_0 exp(gain * integral)`` while the cross-entropy is below ``target`` and lowers it above: after each step
    ``log(target / CE)``, cut off at ``better`` and ``-worse``, is added to the integral, which stays above 0. A share
    of the inputs is attacked. The network's rectifiers become half Huber losses, and stay so when deployed.

    Departures: ``psi`` is that before the step (in the code it already knows the step's own cross-entropy); attacked
    inputs stay in ``[0, 1]``, and PGD's step size is constant. The paper trains from the start, 200 epochs.

    Args:
        psi: ``psi_0``.
        gain: of the controller.
        target: cross-entropy that the controller aims at. It is high where classes are few or easy: accuracy pays.
        better: largest increase of the integral in a step.
        worse: largest decrease.
        tandem: ``zeta``.
        attack: PGD in training, ``None``: no inputs are attacked. By default 0.01 root mean square on CIFAR-10.
        attacked_share: of the inputs that are attacked.
        delta: of the half Huber loss; ``None`` keeps the rectifiers.
        training: epochs, batch, optimiser.
        norms: ``train`` by default: the activations are others than those of the pretrained network.

    Raises:
        UnsupportedModelError: ``delta`` for a network without rectifiers.
    """

    psi: Positive = 220.0
    gain: Positive = 0.02
    target: Positive = 1.5
    better: NonNegative = 1.0
    worse: NonNegative = 0.01
    tandem: Fraction = 0.2
    attack: PGD | None = field(default_factory=lambda: PGD(0.55, steps=7, step_size=0.16, norm="l2"))
    attacked_share: Fraction = 0.5
    delta: Positive | None = 0.5
    training: Training = field(
        default_factory=lambda: Training(epochs=20, batch_size=128, lr=0.01, optimizer="sgd", weight_decay=1e-4)
    )
    norms: Norms = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack is not None:
            refuse_no_room(self, self.attack, "attack")

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        if self.delta is not None:
            require_rectifiers(model, stack(data, range(1))[0].to(session.device), "the half Huber loss of woods")
            model = HalfHuberNetwork(model, self.delta)
        return super()._harden(model, data, session)

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        with torch.no_grad():
            num_classes = answer(network, x[:1]).shape[1]
        return WoodsLoss(network, self, Controller(), num_classes)

    def _module(self, model: nn.Module, network: nn.Module, loss: HardeningLoss) -> LossModule:
        module = super()._module(model, network, loss)
        assert isinstance(loss, WoodsLoss)  # for the type checker
        module.controller = loss.controller
        return module


class Controller(nn.Module):
    """The integral behind ``psi``, kept in checkpoints and the same in all processes, as a batch norm's statistics."""

    integral: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("integral", torch.zeros(()))
        self.track_running_stats = True

    @torch.no_grad()
    def update(self, change: Tensor) -> None:
        """Add to the integral, which stays above 0."""
        if self.track_running_stats:
            self.integral.add_(change.to(self.integral)).clamp_(min=0)


@dataclass(frozen=True)
class WoodsLoss(HardeningLoss):
    """``CE + psi * mean |ds/dx|^2`` of each sample.

    Args:
        settings: the defense.
        controller: knows ``psi``.
        num_classes: of the network.
    """

    settings: Woods
    controller: Controller
    num_classes: int

    @property
    def psi(self) -> Tensor:
        """The current weight."""
        return self.settings.psi * (self.settings.gain * self.controller.integral).exp()

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """The inputs, some of them attacked; the random classes; whether the label's lead is taken instead."""
        settings, streams = self.settings, Streams.of(x, step.seed, "woods", step.epoch)
        one = x.new_empty(len(x), 1)
        affected, tandem = (
            streams.uniform(one)[:, 0] < chance for chance in (settings.attacked_share, settings.tandem)
        )
        classes = streams.integers(self.num_classes).to(x.device)
        if settings.attack is None or not bool(affected.any()):
            return x, classes, tandem
        moved = attacked(settings.attack, self.network, x, y, step)
        return torch.where(expand(affected, x), moved, x), classes, tandem

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """As the class says."""
        inputs, classes, tandem = others
        given, logits = classified(network, inputs)
        task, psi = self.task(logits, y), self.psi
        lead = pick(logits, y) - pick(logits, runner_up(logits, y))
        slope = gradient(torch.where(tandem, lead, pick(logits, classes)), given)
        self._control(task.detach().mean())
        return task + psi * slope.square().flatten(1).mean(1)

    def _control(self, task: Tensor) -> None:
        tiny = torch.finfo(task.dtype).tiny
        change = math.log(self.settings.target) - task.clamp(min=tiny).log()
        self.controller.update(change.clamp(-self.settings.worse, self.settings.better))
