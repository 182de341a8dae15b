"""Adversarial interpretation distillation (AID): attacks on the prediction change the map of a trained interpreter."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustexplain import maps as ops
from robustexplain.attacks import ADV2
from robustexplain.attacks.inner import crafted
from robustexplain.data import stack
from robustexplain.errors import FieldError
from robustexplain.fields import NonNegative, identified
from robustexplain.files import digest_tensors
from robustexplain.interpreters import (
    RTS,
    Aggregate,
    Composed,
    Interpreter,
    MaskingModel,
    MaskObjective,
    OfTransformed,
    Smoothed,
)
from robustexplain.interpreters.composed.base import walk
from robustexplain.interpreters.masks.rts_training import mask_loss
from robustexplain.random_streams import Streams, derive
from robustexplain.registry import DEFENSES
from robustexplain.system import System, described
from robustexplain.training import Samples, Session, Training, TrainingStep, fit, frozen
from robustexplain.transforms import HarmlessChange, harmless_for, one_of

from ..base import TrainedDefense, refuse

TRAINED_THROUGH = (Aggregate, Smoothed, OfTransformed)
"""Interpreters that explain an input by one map of each of their parts; others explain noisy copies, or neighbours."""


@DEFENSES.register("aid", paper="Zhang et al. 2020, section 5 Q3 and A5, eq. 22-23", needs=("rts", "data"))
@dataclass(frozen=True)
class AID(TrainedDefense):
    """Train an interpreter's own network so that its map changes when the prediction is attacked (eq. 23).

    ``-||g(x) - g(A(x))||_1``, where ``A`` is ADV2 against the current weights, towards a random class and the benign
    map. The distance is *maximised*, so that an attacked prediction comes with a visibly different map. Of the
    interpreters here only RTS has a network of its own; within others (an aggregate, beta-smoothing, behind a
    transform) it is trained so that the map of the whole moves.

    Training starts from the system's weights. Each step uses both losses, eq. 22 and eq. 23 times ``weight``; with
    ``alternate`` they take turns, as in the paper (A5). An optimiser that rescales its steps (AdamW) then leaves
    ``weight`` almost without effect.

    A third term, ``harmless_weight * ||g(x) - g(harmless x)||_1``, is not in the paper: without it maps move under
    harmless changes as far as under an attack, and nobody can tell the two apart (see :class:`ConsistentAID`).

    Args:
        weight: of eq. 23, as a mean over pixels, relative to eq. 22. Too small a weight gives no protection at all.
        attack: the ADV2 attack in training.
        objective: the four terms of eq. 22, as in the training of the RTS.
        training: epochs, batch, optimiser.
        encoder_weight: of the encoder's cross-entropy; 0 freezes the encoder.
        alternate: optimiser steps of eq. 22 and of the other terms in turn.
        harmless_weight: of the distance between the maps of an input before and after a harmless change.
        harmless: the changes, of which each input gets one; none: the usual ones of images.
    """

    weight: NonNegative = 3.0
    attack: ADV2 = field(default_factory=lambda: ADV2(steps=20, step_size=0.01, warm_start=0.5))
    objective: MaskObjective = field(default_factory=MaskObjective)
    training: Training = field(default_factory=lambda: Training(epochs=8, lr=1e-3))
    encoder_weight: NonNegative = 1.0
    alternate: bool = False
    harmless_weight: NonNegative = 0.0
    harmless: tuple[HarmlessChange, ...] = ()

    layer = "interpreter"
    defends: ClassVar[tuple[str, ...]] = ("rts",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "harmless", tuple(self.harmless))
        if self.attack.eps == 0:
            raise FieldError(type(self).__name__, "attack.eps", "must be above 0: there is no attack to learn from")

    def _train(self, system: System, data: Samples, session: Session) -> System:
        kind = type(system.interpreter).__name__
        refuse(
            not maskers(system.interpreter),
            f"AID trains the interpreter's own network, and {kind} has none: apply {self.name} to an RTS first",
        )
        around = [type(part).__name__ for part in walk(system.interpreter) if _hides(part)]
        refuse(bool(around), f"AID does not train through {''.join(around[:1])}: apply {self.name} to the RTS first")
        model = system.model.to(session.device)
        # The copy of a masker around the very classifier has a classifier of its own.
        hardened = copy.deepcopy(system.interpreter).on_model(model)
        module = OwnNetworks(hardened).to(session.device).requires_grad_(True)
        for masker in maskers(hardened):
            masker.encoder.requires_grad_(self.encoder_weight > 0)
        start = digest_tensors(module.maskers.state_dict())
        changes = harmless_for(self.harmless, stack(data, range(1))[0].shape[1:])
        loss = AIDLoss(self, module, changes)
        known = [identified(self), [change.entry for change in changes], digest_tensors(model.state_dict()), start]
        with frozen(model):
            fit(module, loss, data, self.training, name="aid", seed=self.seed, session=session,
                identity=[*known, described(hardened)])  # fmt: skip
        module.maskers.requires_grad_(False)
        return replace(system, model=model, interpreter=hardened)


@DEFENSES.register("aid-consistent", paper="this project, after Zhang et al. 2020", needs=("rts", "data"))
@dataclass(frozen=True)
class ConsistentAID(AID):
    """AID whose maps also stand still under harmless changes, so that a moved map tells a forgery.

    Args:
        weight: of eq. 23.
        harmless_weight: of the distance between the maps of an input before and after a harmless change.
    """

    weight: NonNegative = 8.0
    harmless_weight: NonNegative = 24.0


def maskers(interpreter: Interpreter) -> list[MaskingModel]:
    """The networks of an interpreter's own, and of those that it is made of; each once."""
    found = {id(part.masker): part.masker for part in walk(interpreter) if isinstance(part, RTS)}
    return list(found.values())


def _hides(part: Interpreter) -> bool:
    """Whether an interpreter has networks inside that it does not run once on each input."""
    return isinstance(part, Composed) and not isinstance(part, TRAINED_THROUGH) and bool(maskers(part))


class OwnNetworks(nn.Module):
    """The networks of an interpreter's own as a module, whose forward pass gives the interpreter's maps.

    Args:
        interpreter: with at least one network of its own; the classifier's weights are no part of the module.
    """

    def __init__(self, interpreter: Interpreter) -> None:
        super().__init__()
        self.interpreter = interpreter
        self.maskers = nn.ModuleList(maskers(interpreter))

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Maps ``[B, h, w]`` for classes ``target``, rescaled to ``[0, 1]``; each network's mask and own logits."""
        if isinstance(self.interpreter, RTS):
            # Its map does not need the classifier.
            mask, logits = self.interpreter.masker(x, target)
            return mask, [(mask, logits)]
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [m.register_forward_hook(lambda _m, _x, found: seen.append(found)) for m in self.maskers]
        try:
            maps = self.interpreter.explain(x, target, native=True).maps
        finally:
            for hook in hooks:
                hook.remove()
        return maps if self.interpreter.unit_range else ops.minmax(maps), seen


@dataclass(frozen=True)
class AIDLoss:
    """Eq. 22, eq. 23 and the term of harmless changes on a batch; ADV2 attacks the interpreter in training.

    Args:
        settings: the defense.
        networks: in training, unwrapped: the attack needs no gradient of its weights.
        changes: harmless ones.
    """

    settings: AID
    networks: OwnNetworks
    changes: tuple[HarmlessChange, ...]

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is ``networks``, perhaps wrapped for data-parallel training."""
        settings, turn = self.settings, step.number % 2
        interprets, distils = (True, True) if not settings.alternate else (turn == 0, turn == 1)
        others = self._others(x, y, step) if distils else []
        maps, own = module(torch.cat([x, *(v for v, _, _ in others)]), torch.cat([y, *(c for _, c, _ in others)]))
        benign, *moved = maps.split(len(x))
        # Data-parallel training needs every output in the loss.
        total = torch.stack([0 * logits[: len(x)].sum(1) for _, logits in own]).sum(0)
        if interprets:
            total = total + self._interpretation(x, y, own, step)
        for (_, _, weight), other in zip(others, moved, strict=True):
            total = total + weight * (benign - other).abs().flatten(1).mean(1)
        return total

    def attacked(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, Tensor]:
        """ADV2 inputs ``[b, C, H, W]`` against the current weights, and their goal classes ``[b]``."""
        return crafted(self.settings.attack, self.networks, _system, x, y, step, targeted=True)

    def _others(self, x: Tensor, y: Tensor, step: TrainingStep) -> list[tuple[Tensor, Tensor, float]]:
        """Inputs whose maps are compared with that of ``x``: inputs, explained classes, weight of the distance."""
        settings = self.settings
        found = [(*self.attacked(x, y, step), -settings.weight)]
        if settings.harmless_weight:
            changed = one_of(self.changes, x, derive(step.seed, "harmless", step.epoch))
            found.append((changed, y, settings.harmless_weight))
        return found

    def _interpretation(self, x: Tensor, y: Tensor, own: list[tuple[Tensor, Tensor]], step: TrainingStep) -> Tensor:
        settings, model = self.settings, self.networks.interpreter.model
        losses = [
            mask_loss(
                model, settings.objective, settings.encoder_weight, x, y, mask[: len(x)], logits[: len(x)],
                Streams.of(x, step.seed, step.epoch),
            )
            for mask, logits in own
        ]  # fmt: skip
        return torch.stack(losses).sum(0)


def _system(networks: OwnNetworks) -> System:
    return System(networks.interpreter.model, networks.interpreter)
