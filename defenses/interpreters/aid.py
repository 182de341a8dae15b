"""Adversarial interpretation distillation (AID): an RTS trained so that attacks on the prediction change its map."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustexplain.attacks import ADV2
from robustexplain.attacks.inner import crafted
from robustexplain.fields import NonNegative
from robustexplain.files import digest_tensors
from robustexplain.interpreters import RTS, Composed, MaskingModel, MaskObjective
from robustexplain.interpreters.masks.rts_training import mask_loss
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, TrainingStep, fit, frozen

from ..base import TrainedDefense, refuse


@DEFENSES.register("aid", paper="Zhang et al. 2020, section 5 Q3 and A5, eq. 22-23", needs=("rts", "data"))
@dataclass(frozen=True)
class AID(TrainedDefense):
    """Train an RTS so that its map changes when the prediction is attacked (eq. 23): ``-||g(x) - g(A(x))||_1``.

    ``A`` is ADV2 against the interpreter's current weights, towards a random class and the benign map. The distance is
    *maximised*, so that an attacked prediction comes with a visibly different map. Training starts from the system's
    RTS, and each step uses both losses (eq. 22 and eq. 23); the paper alternates them, so that their relative weight
    depends on the optimiser.

    Args:
        weight: of eq. 23, as a mean over pixels, relative to eq. 22. Too small a weight gives no protection at all.
        attack: the ADV2 attack in training.
        objective: the four terms of eq. 22, as in the training of the RTS.
        training: epochs, batch, optimiser.
        encoder_weight: of the encoder's cross-entropy; 0 freezes the encoder.
    """

    weight: NonNegative = 3.0
    attack: ADV2 = field(default_factory=lambda: ADV2(steps=20, step_size=0.01, warm_start=0.5))
    objective: MaskObjective = field(default_factory=MaskObjective)
    training: Training = field(default_factory=lambda: Training(epochs=8, lr=1e-3))
    encoder_weight: NonNegative = 1.0

    layer = "interpreter"
    defends: ClassVar[tuple[str, ...]] = ("rts",)

    def _train(self, system: System, data: Samples, session: Session) -> System:
        kind = type(system.interpreter).__name__
        refuse(
            isinstance(system.interpreter, Composed),
            f"AID trains an RTS itself, and the system explains by {kind}: apply aid to the RTS first, then "
            f"{' and '.join(map(repr, system.defenses)) or 'what is around it'}",
        )
        refuse(
            not isinstance(system.interpreter, RTS),
            f"AID trains the interpreter's own network, and {kind} has none; use RTS",
        )
        assert isinstance(system.interpreter, RTS)  # refused above; for the type checker
        masker = copy.deepcopy(system.interpreter.masker).to(session.device)
        masker.requires_grad_(True)
        masker.encoder.requires_grad_(self.encoder_weight > 0)
        start = digest_tensors(masker.state_dict())
        loss = AIDLoss(self, system.model.to(session.device), masker)
        with frozen(system.model):
            fit(masker, loss, data, self.training, name="aid", seed=self.seed, session=session,
                identity=[asdict(self), digest_tensors(system.model.state_dict()), start])  # fmt: skip
        return replace(system, interpreter=RTS(system.model, masker.requires_grad_(False)))


@dataclass(frozen=True)
class AIDLoss:
    """Eq. 22 + weight x eq. 23 of a batch; ADV2 attacks the masker in training.

    Args:
        settings: the defense.
        model: the classifier, frozen.
        masker: the network in training, unwrapped: the attack needs no gradient of its weights.
    """

    settings: AID
    model: nn.Module
    masker: MaskingModel

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the masker, perhaps wrapped for data-parallel training."""
        settings = self.settings
        attacked, goal = self.attacked(x, y, step)
        mask, logits = module(torch.cat([x, attacked]), torch.cat([y, goal]))
        benign, forged = mask.chunk(2)
        streams = Streams.of(x, step.seed, step.epoch)
        interpretation = mask_loss(
            self.model, settings.objective, settings.encoder_weight, x, y, benign, logits.chunk(2)[0], streams
        )
        distillation: Tensor = -(benign - forged).abs().flatten(1).mean(1)
        return interpretation + settings.weight * distillation

    def attacked(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, Tensor]:
        """ADV2 inputs ``[b, C, H, W]`` against the masker's current weights, and their goal classes ``[b]``."""
        return crafted(self.settings.attack, self.masker, self._system, x, y, step, targeted=True)

    def _system(self, masker: MaskingModel) -> System:
        return System(self.model, RTS(self.model, masker))
