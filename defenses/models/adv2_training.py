"""ADV2 training: the forger in the loop, so that the prediction stays right and the map steady."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustexplain.attacks import ADV2
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Fraction, NonNegative
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, TrainingStep
from robustexplain.training.losses import right

from .fine_tuned import FineTuned, refuse_no_room
from .forger import Forger, apart, no_images, refuse_other_maps, trainable_specs
from .loss_module import HardeningLoss


@DEFENSES.register("adv2-at", paper="this project", needs=("differentiable maps", "data"))
@dataclass(frozen=True)
class ADV2Training(FineTuned):
    """Fine-tune the classifier on ADV2's inputs: they are to be classified right, with the map of the benign input.

    The loss of a sample is ``C * CE(x) + (1 - C) * CE(forged x) + steady * |m_y(x) - m_y(forged x)|``, with ``y`` the
    label and the distance a mean over pixels of maps as they are judged, at the input's size and rescaled to ``[0,
    1]``. The forged input is computed at each step against the current weights: it aims at another class and at the
    benign map. Where ``revealing`` makes a forged map move, this makes the forgery fail.

    Args:
        training: epochs, batch, optimiser. With ``validation``, the epoch of the best accuracy on forged inputs is
            kept.
        norms: ``eval`` only: a map is explained in eval mode.
        interpreters: whose maps are trained, by name, by class or with settings of their own; several at once count
            alike, and the inner attack must deceive all of them.
        steady: of the distance of the maps.
        clean_weight: ``C``, share of the benign input's cross-entropy.
        attack: ADV2 in training, towards a random class and the benign map.

    Raises:
        NotDifferentiableError: an interpreter whose maps have no gradient to the weights, or are an optimisation's.
    """

    interpreters: Sequence[InterpreterSpec | type[Interpreter] | str] = ("gradcam",)
    steady: NonNegative = 4.0
    clean_weight: Fraction = 0.5
    attack: ADV2 = field(default_factory=lambda: ADV2(steps=12, step_size=0.006, warm_start=0.5))
    training: Training = field(default_factory=lambda: Training(epochs=8, lr=1e-3, weight_decay=0.0))

    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "interpreters", trainable_specs(self, self.interpreters))
        refuse_no_room(self, self.attack, "attack")
        if self.norms != "eval":
            raise FieldError(
                type(self).__name__, "norms", f"must be 'eval', where maps are explained, got {self.norms!r}"
            )

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return no_images(self, shape)

    def _train(self, system: System, data: Samples, session: Session) -> System:
        refuse_other_maps(self, self._specs, system)
        return super()._train(system, data, session)

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        why = self.misfit(tuple(x.shape[1:]))
        if why is not None:
            raise InputError(why)
        forger = Forger.against(network, self._specs, (self.attack,))
        with torch.no_grad():
            forger.module(x)  # finds its layers, or refuses
        return ADV2Loss(network, forger, self.steady, self.clean_weight)

    @property
    def _specs(self) -> tuple[InterpreterSpec, ...]:
        return tuple(InterpreterSpec.of(member) for member in self.interpreters)


@dataclass(frozen=True)
class ADV2Loss(HardeningLoss):
    """``C * CE(x) + (1 - C) * CE(forged x) + steady * |m_y(x) - m_y(forged x)|`` of each sample.

    Args:
        forger: the attack in training, and the maps of ``network`` that it attacks.
        steady: of the distance of the maps.
        clean_weight: ``C``.
    """

    forger: Forger
    steady: float
    clean_weight: float

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """The forged inputs."""
        return self.forger(x, y, step)[:1]

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """As the class says."""
        labels = torch.cat([y, y])
        logits, maps, _ = self.forger.module(torch.cat([x, *others]), labels)
        benign, forged = self.task(logits, labels).chunk(2)
        task = self.clean_weight * benign + (1 - self.clean_weight) * forged
        return task + self.steady * apart(*maps.chunk(2))

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy`` and, on forged inputs, ``forged_accuracy``."""
        (forged,) = self.others(x, y, step)
        return super().figures(module, x, y, step) | {"forged_accuracy": right(answer(module, forged, finite=False), y)}
