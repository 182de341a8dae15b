"""ADV2 training: the forger in the loop, so that the prediction stays right and the map steady."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.attacks import ADV2
from robustexplain.data import stack
from robustexplain.errors import InputError
from robustexplain.fields import Fraction, NonNegative
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, TrainingStep, fit

from .base import ModelDefense
from .forger import Forger, apart, no_images, refuse_no_ball, refuse_other_maps, trainable_specs


@DEFENSES.register("adv2-at", paper="this project", needs=("differentiable maps", "data"))
@dataclass(frozen=True)
class ADV2Training(ModelDefense):
    """Fine-tune the classifier on ADV2's inputs: they are to be classified right, with the map of the benign input.

    The loss of a sample is ``C * CE(x) + (1 - C) * CE(forged x) + steady * |m_y(x) - m_y(forged x)|``, with ``y`` the
    label and the distance a mean over pixels of maps as they are judged, at the input's size and rescaled to ``[0,
    1]``. The forged input is computed at each step against the current weights: it aims at another class and at the
    benign map. Where ``revealing`` makes a forged map move, this makes the forgery fail. Batch norms keep their
    statistics.

    Args:
        interpreters: whose maps are trained, by name, by class or with settings of their own; several at once count
            alike, and the inner attack must deceive all of them.
        steady: of the distance of the maps.
        clean_weight: ``C``, share of the benign input's cross-entropy.
        attack: ADV2 in training, towards a random class and the benign map.
        training: epochs, batch, optimiser.

    Raises:
        NotDifferentiableError: an interpreter whose maps have no gradient to the weights, or are an optimisation's.
    """

    interpreters: Sequence[InterpreterSpec | type[Interpreter] | str] = ("gradcam",)
    steady: NonNegative = 4.0
    clean_weight: Fraction = 0.5
    attack: ADV2 = field(default_factory=lambda: ADV2(steps=12, step_size=0.006, warm_start=0.5))
    training: Training = field(default_factory=lambda: Training(epochs=8, lr=1e-3, weight_decay=0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "interpreters", trainable_specs(self, self.interpreters))
        refuse_no_ball(self, self.attack, "attack")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return no_images(self, shape)

    def _train(self, system: System, data: Samples, session: Session) -> System:
        refuse_other_maps(self, self._specs, system)
        return super()._train(system, data, session)

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        why = self.misfit(tuple(stack(data, range(1))[0].shape[1:]))
        if why is not None:
            raise InputError(why)
        forger = Forger.against(model, self._specs, (self.attack,))
        loss = ADV2Loss(forger, self.steady, self.clean_weight)
        known = [asdict(self), digest_tensors(model.state_dict())]
        fit(forger.module, loss, data, self.training, name="adv2-at", seed=self.seed, session=session, identity=known,
            evaluating=True)  # fmt: skip
        return model

    @property
    def _specs(self) -> tuple[InterpreterSpec, ...]:
        return tuple(InterpreterSpec.of(member) for member in self.interpreters)


@dataclass(frozen=True)
class ADV2Loss:
    """``C * CE(x) + (1 - C) * CE(forged x) + steady * |m_y(x) - m_y(forged x)|`` of each sample, ``[b]``.

    Args:
        forger: the attack in training, and what it attacks.
        steady: of the distance of the maps.
        clean_weight: ``C``.
    """

    forger: Forger
    steady: float
    clean_weight: float

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` explains the model, perhaps wrapped for data-parallel training."""
        forged, _ = self.forger(x, y, step)
        labels = torch.cat([y, y])
        logits, maps, _ = module(torch.cat([x, forged]), labels)
        benign, attacked = F.cross_entropy(logits, labels, reduction="none").chunk(2)
        task = self.clean_weight * benign + (1 - self.clean_weight) * attacked
        return task + self.steady * apart(*maps.chunk(2))
