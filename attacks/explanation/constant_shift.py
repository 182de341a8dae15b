"""Constant input shift: as an attack on the deployed model, and in its exact form on a compensated model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from robustexplain import checks
from robustexplain.autograd import input_shift
from robustexplain.door import admit
from robustexplain.errors import InputError
from robustexplain.fields import Count, Eps, Fraction, Positive
from robustexplain.objectives import DropTopK, Goal, KeepPrediction, Objective, TopKLeft
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.rounding import moved_by, wide
from robustexplain.system import System

from ..base import Attack
from ..search.loop import Plan, Search, SearchResult, Stage
from ..search.updates import SignStep
from ..threat import Threat
from .ghorbani import RandomSign


@dataclass(frozen=True)
class Shift(Threat):
    """``x + c`` with one number ``c`` per channel, ``|c| <= eps``; the variable is ``c``, ``[B, C, 1, 1]``.

    Args:
        eps: in the units of ``[0, 1]`` pixels.
        saturate: allow pixels to be clipped at 0 and 1. Otherwise ``c`` is limited so that none is, and the shift is
            constant: it is zero on an image that contains both black and white.
    """

    eps: Eps = 8 / 255
    saturate: bool = False

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """No shift, or a random one."""
        zero = wide(x.new_zeros(*x.shape[:2], 1, 1))
        return zero if streams is None else self.project(x, self.sample(x, streams))

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The shifted image."""
        return moved_by(x, variable)

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clip to ``eps`` and, without ``saturate``, so that pixels stay in ``[0, 1]``."""
        variable = variable.clamp(-self.eps, self.eps)
        if self.saturate:
            return variable
        return torch.min(torch.max(variable, -x.amin((2, 3), keepdim=True)), 1 - x.amax((2, 3), keepdim=True))

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """A random direction (uniform in the cube, scaled to its surface) times a random share of ``eps``."""
        u = streams.uniform(wide(x.new_empty(*x.shape[:2], 1, 1)), -1, 1)
        share = streams.uniform(wide(x.new_empty(len(x), 1, 1, 1)))
        return self.eps * share * u / u.abs().amax(1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class _Trials(Plan):
    """Random search: the best of no change and of ``trials`` random allowed ones."""

    threat: Threat
    objective: Objective
    trials: Count

    @property
    def aim(self) -> Objective:
        return self.objective

    @property
    def summary(self) -> str:
        return "random search"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        stage = Stage(self.objective, 0, SignStep(0.0))
        return Search(self.threat, (stage,), RandomSign(), restarts=self.trials + 1).run(system, goal, streams)


@ATTACKS.register("constant-shift", paper="Kindermans et al. 2019, section 2")
@dataclass(frozen=True)
class ConstantShift(Attack):
    """Add one number to each channel, keep the output and change the map, by random search over these numbers.

    Kindermans et al. shift the input of a model *that compensates the shift*: logits and gradients are then equal, and
    a map that changes depends on where zero lies; :func:`compensated` is that exact form. On the deployed model, which
    stays as it is, a shift changes the logits. This attack therefore accepts shifts that change the benign class's
    probability by at most ``tolerance``, and among those prefers the smallest top-``k`` intersection. It needs no
    gradient of the maps, so any interpreter can be attacked.

    Args:
        eps: largest shift of a channel, in the units of ``[0, 1]`` pixels.
        steps: number of random shifts.
        k: the pixels ranked highest: a count from 1 on, a share below 1.
        tolerance: largest change of the benign class's probability; 1 requires the label only.
        saturate: allow pixels to be clipped at 0 and 1, unlike the paper's shift.
    """

    eps: Eps = 0.1
    steps: Count = 100
    k: Positive = 0.1
    tolerance: Fraction = 0.05
    saturate: bool = False

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True
    moves_map: ClassVar[bool] = True

    def differentiates(self, system: System) -> bool:
        """Never: it uses the maps' values only."""
        return False

    def plan(self, system: System) -> Plan:
        """Random shifts, compared by the map."""
        objective = DropTopK(self.k) + TopKLeft(self.k) + 0.0 * KeepPrediction(self.tolerance)
        return _Trials(Shift(self.eps, self.saturate), objective, self.steps)


class Compensated(NamedTuple):
    """Shifted inputs ``[B, C, H, W]``, and a system with the same outputs on them as the original on the inputs."""

    x: Tensor
    system: System


@torch.no_grad()
def compensated(system: System, x: Tensor, shift: Tensor | float) -> Compensated:
    """``x + shift``, and the system whose first layer subtracts the shift: ``f_2(x + m) = f_1(x)`` exactly.

    The new system holds a copy of the model and of the interpreter; its detector, which belongs to the old model,
    is left out. Classes, weights and gradients are the same; a difference between the maps of the two shows that the
    interpreter depends on where zero lies (Kindermans et al. 2019, section 2). The identity also holds at padded
    borders, unlike the paper's: the shifted input is padded with the shift.

    Args:
        system: its model's first layer is a plain convolution or a linear layer on the (normalised) image.
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        shift: what is added, one number or ``[C]``; ``x + shift`` must stay in ``[0, 1]``.

    Raises:
        InputError: a shift of another shape, or one that leaves ``[0, 1]``.
        UnsupportedModelError: no such first layer, or the copy's outputs differ from the model's.
    """
    checks.images(x, "a constant shift")
    admit(system.model, x)
    moved = x + input_shift.per_channel(shift, x)
    if float(moved.min()) < 0 or float(moved.max()) > 1:
        low, high = -float(x.min()), 1 - float(x.max())
        raise InputError(f"x + shift leaves [0, 1]; these images have room from {low:.3g} to {high:.3g}, got {shift}")
    model = input_shift.compensated(system.model, x, shift)
    interpreter = copy.deepcopy(system.interpreter, {id(system.model): model})
    return Compensated(moved, System(model, interpreter))
