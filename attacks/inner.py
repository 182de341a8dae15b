"""An attack inside a loss: adversarial inputs against a network that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustexplain.door import answer
from robustexplain.random_streams import derive
from robustexplain.system import System
from robustexplain.training import TrainingStep, eval_mode, frozen

from .base import Attack
from .goals import random_classes

Network = TypeVar("Network", bound=nn.Module)


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
        found = replace(attack.adapted(system), seed=seed)(system, x, y, goal)
    return found.x.detach(), y if goal is None else goal


@torch.no_grad()
def _num_classes(model: nn.Module, x: Tensor) -> int:
    return int(answer(model, x[:1]).shape[1])
