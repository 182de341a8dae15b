"""An attack inside a loss: adversarial inputs against a network that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from robustexplain.autograd.second_derivatives import twice_differentiable
from robustexplain.door import answer
from robustexplain.errors import InputError
from robustexplain.interpreters import Gradient
from robustexplain.objectives import Goal, Objective, Observation
from robustexplain.random_streams import derive
from robustexplain.system import System
from robustexplain.training import TrainingStep, eval_mode, frozen

from .base import Attack
from .goals import random_classes
from .prediction.gradient import PGD
from .search.loop import Search

Network = TypeVar("Network", bound=nn.Module)
InnerLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``loss(network, x, logits)`` gives ``[b]`` losses of attacked inputs ``x`` and their ``logits``.

Autograd follows ``x``, and ``logits`` were computed from it. Sample ``i`` is sample ``i`` of the batch that is
attacked, so that what is known of the batch can be kept beside the function.
"""


def crafted(
    attack: Attack,
    network: Network,
    make_system: Callable[[Network], System],
    x: Tensor,
    y: Tensor,
    step: TrainingStep,
    *,
    targeted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adversarial inputs against the network's current weights, detached, and their goal classes.

    During the attack the network is in eval mode (batch norms use their running statistics and do not update them,
    dropout is off) and its weights need no gradient. Afterwards, also after an error, every mode and ``requires_grad``
    flag is restored. An input's random draws depend on the training's seed, the epoch and the input alone.

    Args:
        attack: adapted to the system; its seed is replaced by one of the training step.
        network: in training, not wrapped for data parallelism: the attack needs no synchronised gradients.
        make_system: makes the attacked system from the network.
        x: benign inputs ``[b, ...]``.
        y: their labels ``[b]``.
        step: of the training.
        targeted: towards a random class other than ``y``, drawn for each input; else untargeted.

    Returns:
        The attacked inputs, and the goal classes ``[b]``, which are ``y`` if the attack is not targeted.
    """
    seed = derive(step.seed, step.epoch)
    with eval_mode(network), frozen(network):
        system = make_system(network)
        goal = random_classes(x, y, _num_classes(system.model, x), seed) if targeted else None
        # A model behind rounding or random transforms gives a gradient only to an attack that knows it.
        found = replace(attack.adapted(system), seed=seed).inputs(system, x, y, goal)
    return found.detach(), y if goal is None else goal


def attacked(attack: Attack, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
    """Inputs ``[b, ...]`` of an untargeted attack that uses no maps, detached; as :func:`crafted`."""
    return crafted(attack, network, plain, x, y, step)[0]


def plain(network: nn.Module) -> System:
    """A system for attacks that use no maps, so that any interpreter fits."""
    return System(network, Gradient(network))


def maximised(
    pgd: PGD, network: nn.Module, loss: InnerLoss, x: Tensor, y: Tensor, step: TrainingStep, *, sloped: bool = True
) -> Tensor:
    """Inputs ``[b, ...]`` that maximise a loss against the network's current weights, detached; as :func:`crafted`.

    A step takes the passes of ``loss`` and the forward pass that gives ``logits``, nothing more; the last iterate is
    evaluated once more, and the best one is returned.

    Args:
        pgd: radius, norm, steps, start. A distance to the map of ``x`` itself has no gradient there: start at random.
        network: in training, not wrapped.
        loss: to be maximised; a sample's depends on that sample alone, and may have input gradients in it.
        x: benign inputs.
        y: their labels.
        step: of the training.
        sloped: whether the loss has input gradients in it; without them the look at the last iterate takes no graph.

    Raises:
        InputError: a loss that is not ``[b]``.
    """
    with twice_differentiable():
        return attacked(Maximising(pgd, Raise(loss, sloped)), network, x, y, step)


@dataclass(frozen=True)
class Raise(Objective):
    """Minus a loss of the network at the current inputs.

    Args:
        of: the loss.
        sloped: whether it has input gradients in it.
    """

    of: InnerLoss
    sloped: bool = True

    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -torch.inf

    @property
    def settled(self) -> bool:
        """Always."""
        return True

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """Minus the loss, ``[b]``."""
        if seen.system is None:
            raise InputError("Raise needs an observation with its system")
        x, logits = seen.x, seen.logits
        with torch.set_grad_enabled(self.sloped or logits.requires_grad):
            if self.sloped and not logits.requires_grad:
                # The last look at a search's iterate has no graph, and this loss takes input gradients.
                x = x.detach().requires_grad_()
                logits = answer(seen.system.model, x)
            value = self.of(seen.system.model, x, logits)
        if value.shape != (len(x),):
            raise InputError(f"an inner loss must be one number a sample, [{len(x)}], got {list(value.shape)}")
        return -value


@dataclass(frozen=True)
class Maximising(Attack):
    """The search of a PGD with another objective, which no iterate meets.

    Args:
        pgd: radius, norm, steps, start.
        objective: minimised.
    """

    pgd: PGD
    objective: Objective

    def plan(self, system: System) -> Search:
        """PGD's, adapted to rounding and random transforms in front of the model."""
        return replace(self.pgd.adapted(system), early_stop=False).search(self.objective)


@torch.no_grad()
def _num_classes(model: nn.Module, x: Tensor) -> int:
    return int(answer(model, x[:1]).shape[1])
