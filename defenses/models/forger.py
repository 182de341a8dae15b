"""What trainings with a forger in the loop share: which maps can be trained, the forged inputs, distances of maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustexplain.attacks import Attack
from robustexplain.attacks.inner import crafted
from robustexplain.attacks.joint.aimed import Shown
from robustexplain.attacks.joint.member_maps import MemberMaps
from robustexplain.errors import FieldError, InputError, NotDifferentiableError
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.base import walk
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.interpreters.spec import SpecLike
from robustexplain.registry import INTERPRETERS, Entry
from robustexplain.system import System
from robustexplain.training import TrainingStep, eval_mode

from ..base import Defense, refuse


def trainable_specs(defense: Defense, interpreters: Sequence[SpecLike]) -> tuple[InterpreterSpec, ...]:
    """The interpreters whose maps a defense trains.

    Raises:
        InputError: none, or one that is made of more than the classifier.
        NotDifferentiableError: one whose maps have no gradient to the weights, or are an optimisation's.
    """
    specs = tuple(InterpreterSpec.of(member) for member in interpreters)
    if not specs:
        raise FieldError(type(defense).__name__, "interpreters", "must name one at least, got none")
    for spec in specs:
        if spec.refusal is not None:
            raise InputError(f"{defense.name} trains the classifier's own maps: {spec.refusal}")
        if not _trainable(spec.entry):
            able = ", ".join(e.name for e in INTERPRETERS if _trainable(e) and InterpreterSpec(e.name).refusal is None)
            raise NotDifferentiableError(
                f"{defense.name} differentiates maps in the classifier's weights, and those of {spec.name!r} have no "
                f"such gradient; interpreters that do: {able}"
            )
    return specs


def refuse_other_maps(defense: Defense, specs: Sequence[InterpreterSpec], system: System) -> None:
    """Refuse a system that explains by none of the interpreters whose maps are trained."""
    explaining = {type(part) for part in walk(system.interpreter)}
    names = ", ".join(map(str, specs))
    refuse(
        not any(spec.entry.build in explaining for spec in specs),
        f"{defense.name} trains the maps of {names}, and the system explains by {type(system.interpreter).__name__}: "
        "name that one in interpreters, or harden the model alone with hardened(model, data)",
    )


def no_images(defense: Defense, shape: tuple[int, ...]) -> str | None:
    """Why inputs of ``shape`` cannot be forged in training; ``None`` where they can."""
    if len(shape) == 3:
        return None
    return f"{defense.name} forges images [C, H, W] in training; a sample has shape {list(shape)}"


@dataclass(frozen=True)
class Forger:
    """Attacks in training, and the maps that they deceive.

    Args:
        attacks: of several the input counts that deceives, with the nearer map; all have the same goal class.
        module: explains the model in training by maps as they are judged, at the input's size and rescaled to
            ``[0, 1]``; unwrapped.
        attacked: the interpreter of that model that the attacks see.
    """

    attacks: tuple[Attack, ...]
    module: ExplainingModel
    attacked: Interpreter

    @classmethod
    def against(cls, model: nn.Module, specs: Sequence[InterpreterSpec], attacks: tuple[Attack, ...]) -> Forger:
        """The forger of a model whose maps of ``specs`` are trained side by side."""
        members = tuple(spec.build(model) for spec in specs)
        shown = MemberMaps(model, tuple(Shown(model, member) for member in members))
        attacked = members[0] if len(members) == 1 else MemberMaps(model, members)
        return cls(attacks, ExplainingModel(shown), attacked)

    def __call__(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, Tensor]:
        """Forged inputs ``[b, C, H, W]`` against the current weights, and their goal classes ``[b]``."""
        made = [crafted(attack, self.module, self._system, x, y, step, targeted=True) for attack in self.attacks]
        goal = made[0][1]
        if len(made) == 1:
            return made[0]
        inputs = torch.stack([found for found, _ in made])
        with torch.no_grad(), eval_mode(self.module):
            benign = self.module(x, y)[1]
            seen = [self.module(found, goal)[:2] for found in inputs]
        # A distance is at most 1.
        rank = torch.stack([2.0 * (logits.argmax(1) != goal) + apart(benign, maps) for logits, maps in seen])
        return inputs[rank.argmin(0), torch.arange(len(x), device=x.device)], goal

    def _system(self, module: ExplainingModel) -> System:
        return System(module.model, self.attacked)


def apart(maps: Tensor, others: Tensor) -> Tensor:
    """Mean absolute difference of maps ``[b, h, w]``, ``[b]``."""
    return (maps - others).abs().flatten(1).mean(1)


def _trainable(entry: Entry) -> bool:
    # Of an interpreter made of others it is a property, which the class does not know.
    build = entry.build
    return getattr(build, "differentiable", False) is True and not getattr(build, "iterative", False)
