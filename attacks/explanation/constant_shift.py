"""Constant input shift as an attack: on the deployed model, and exactly, on one that takes the shift back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from robustexplain import checks
from robustexplain import maps as ops
from robustexplain.autograd import input_shift
from robustexplain.errors import InputError
from robustexplain.fields import Count, Eps, Fraction, Positive
from robustexplain.objectives import DropTopK, Goal, KeepPrediction, Objective, TopKLeft
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..base import Attack
from ..search.loop import Plan, Search, SearchResult, Stage
from ..search.updates import SignStep
from ..threat import Threat
from .ghorbani import RandomSign


@dataclass(frozen=True)
class Shift(Threat):
    """``x + c`` with one number ``c`` a channel, ``|c| <= eps``; the variable is ``c``, ``[B, C, 1, 1]``.

    Args:
        eps: in the units of ``[0, 1]`` pixels.
        saturate: let pixels be clipped at 0 and 1. Otherwise ``c`` is kept to the room that the image leaves, so that
            the shift is constant: none on an image that holds both black and white.
    """

    eps: Eps = 8 / 255
    saturate: bool = False

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """No shift, or a random one."""
        zero = x.new_zeros(*x.shape[:2], 1, 1)
        return zero if streams is None else self.project(x, self.sample(x, streams))

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The shifted image."""
        return ops.clipped(x + variable)

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Into the ball and, unless pixels may saturate, into the room."""
        variable = variable.clamp(-self.eps, self.eps)
        if self.saturate:
            return variable
        return torch.min(torch.max(variable, -x.amin((2, 3), keepdim=True)), 1 - x.amax((2, 3), keepdim=True))

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """A random direction (uniform in the cube, to its surface) at a random share of ``eps``."""
        u = streams.uniform(x.new_empty(*x.shape[:2], 1, 1), -1, 1)
        share = streams.uniform(x.new_empty(len(x), 1, 1, 1))
        return self.eps * share * u / u.abs().amax(1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class _Trials(Plan):
    """Look at no change, then at so many random allowed ones; the best counts."""

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
    """Add one number to each channel, keep the output and move the map: a random search over those few numbers.

    Kindermans et al. shift the input of a model *that takes the shift back*: logits and gradients are then equal, and
    a map that moves depends on where zero lies; :func:`compensated` is that exact form. On the deployed model, which
    stays as it is, a shift changes the logits, so this attack asks for shifts to which they hardly answer: the
    probability of the benign class moves by ``tolerance`` at most, and among those the smallest top-``k`` intersection
    is best. It only looks at maps: any interpreter will do.

    Args:
        eps: largest shift of a channel, in the units of ``[0, 1]`` pixels.
        steps: random shifts that are tried.
        k: the pixels that mattered most: a count from 1 on, a share below 1.
        tolerance: largest change of the benign class's probability; 1 asks for the label alone.
        saturate: let pixels be clipped at 0 and 1, which the paper's shift does not.
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
        """Never."""
        return False

    def plan(self, system: System) -> Plan:
        """Random shifts, judged by the map."""
        objective = DropTopK(self.k) + TopKLeft(self.k) + 0.0 * KeepPrediction(self.tolerance)
        return _Trials(Shift(self.eps, self.saturate), objective, self.steps)


class Compensated(NamedTuple):
    """Shifted inputs ``[B, C, H, W]``, and a system that answers to them as the original one did to the inputs."""

    x: Tensor
    system: System


@torch.no_grad()
def compensated(system: System, x: Tensor, shift: Tensor | float) -> Compensated:
    """``x + shift``, and the system with the shift taken back in its first layer: ``f_2(x + m) = f_1(x)`` exactly.

    The new system holds a copy of the model and of the interpreter; its detector, which watches the old model, is left
    out. The classes, weights and gradients are the same; what differs between the maps of the two depends on where
    zero lies (Kindermans et al. 2019, section 2). The identity holds at padded borders too, which the paper's does not:
    there the padding is the shift.

    Args:
        system: its model's first layer is a plain convolution or a linear layer on the (normalised) image.
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        shift: what is added, one number or ``[C]``; ``x + shift`` must stay in ``[0, 1]``.

    Raises:
        InputError: a shift of another shape, or that leads out of ``[0, 1]``.
        UnsupportedModelError: no such first layer, or the copy does not answer as the model does.
    """
    checks.images(x, "a constant shift")
    checks.evaluating(system.model)
    moved = x + input_shift.per_channel(shift, x)
    if float(moved.min()) < 0 or float(moved.max()) > 1:
        low, high = -float(x.min()), 1 - float(x.max())
        raise InputError(f"x + shift leaves [0, 1]; these images have room from {low:.3g} to {high:.3g}, got {shift}")
    model = input_shift.compensated(system.model, x, shift)
    interpreter = copy.deepcopy(system.interpreter, {id(system.model): model})
    return Compensated(moved, System(model, interpreter))
