"""Universal perturbations: one that is added to every input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.fields import Count, Natural, Positive, Radius
from robustexplain.objectives import Capped, Misclassify
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.rounding import moved_by, wide
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..search.loop import Plan
from ..search.universal import Fitted, UniversalSearch, fit_universal
from ..threat import Norm, Threat
from .gradient import ball, step


@dataclass(frozen=True)
class Universal(Threat):
    """One additive perturbation: ``x' = clip(x + v)`` with ``||v|| <= eps``, in the units of ``[0, 1]`` pixels.

    The variable is ``v`` itself, ``[B, C, H, W]`` or one for all, ``[1, C, H, W]``.

    Args:
        eps: radius; over all pixels and channels in L2.
        norm: ``linf`` or ``l2``.
    """

    eps: Radius = 10 / 255
    norm: Norm = "linf"

    @property
    def summary(self) -> str:
        """With the norm."""
        return f"Universal {'Linf' if self.norm == 'linf' else 'L2'}"

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """No perturbation, or a random one."""
        return torch.zeros_like(wide(x)) if streams is None else self.project(x, self.sample(x, streams))

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """``clip(x + v)``.

        Raises:
            InputError: a perturbation of another shape than the images.
        """
        if variable.shape[1:] != x.shape[1:]:
            raise InputError(
                f"the perturbation was fitted on images of shape {list(variable.shape[1:])}, got {list(x.shape[1:])}"
            )
        return moved_by(x, variable)

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Onto the ball around zero."""
        if self.norm == "linf":
            return variable.clamp(-self.eps, self.eps)
        length = ops.expand(variable.flatten(1).norm(dim=1), variable)
        return variable * (self.eps / length.clamp(min=1e-12)).clamp(max=1)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Uniform in the box, or uniform in direction on the sphere."""
        if self.norm == "linf":
            return streams.uniform(x, -self.eps, self.eps)
        noise = streams.normal(x)
        return noise * (self.eps / ops.expand(noise.flatten(1).norm(dim=1), noise))


@ATTACKS.register("uap", paper="Moosavi-Dezfooli et al. 2017; Shafahi et al. 2020", needs=("gradients", "data"))
@dataclass(frozen=True)
class UAP(Attack):
    """Universal perturbation: one ``v`` that misclassifies most images, by mini-batch gradient steps on them.

    Moosavi-Dezfooli et al. add up DeepFool steps of single images; this is the mini-batch form of Shafahi et al. 2020,
    which they report to be faster and stronger: steps against the mean over a batch of
    ``min(cross-entropy, cap)``, and projection. Departures: away from the label ``y`` that the caller gives, where
    Moosavi-Dezfooli et al. take the benign prediction; images with ``v`` on them are clipped to ``[0, 1]``.

    The attack is computed by :meth:`fitted`; the perturbation is ``fitted.applied.variable``, ``[1, C, H, W]``.

    Args:
        eps: radius; the papers use 10/255 in L-infinity.
        steps: mini-batches.
        step_size: of one step.
        norm: ``linf`` (sign steps) or ``l2`` (steps of that length along the gradient).
        cap: ``beta``, upper bound of the untargeted cross-entropy in nats (Shafahi et al.: 9).
        batch_size: images per step.
        goal_class: the class to be predicted for every image; ``None``: any but its label. Success depends on the goal
            of the call.
        adapt: to a defense.
    """

    eps: Radius = 10 / 255
    steps: Count = 500
    step_size: Positive = 1 / 255
    norm: Norm = "linf"
    cap: Positive = 9.0
    batch_size: Count = 32
    goal_class: Natural | None = None
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def plan(self, system: System) -> Plan:
        """Mini-batch descent on the capped cross-entropy."""
        aim = Capped(Misclassify(), self.cap) + self.adapt.evasion(system)
        threat, update = Universal(self.eps, self.norm), step(self.norm, self.step_size)
        return UniversalSearch(threat, aim, self.steps, update, self.batch_size, self.adapt.direction())

    def fitted(self, system: System, x: Tensor, y: Tensor) -> Fitted:
        """The attack with its perturbation computed on ``x`` ``[N, C, H, W]`` with labels ``y`` ``[N]``.

        Raises:
            InputError: bad tensors, or a goal class out of range.
        """
        return fit_universal(self, system, x, y, self.goal_class)
