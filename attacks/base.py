"""The contract that every input attack keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain import checks
from robustexplain.errors import InputError, NotDifferentiableError
from robustexplain.fields import Natural, check_fields
from robustexplain.objectives import Goal
from robustexplain.registry import INTERPRETERS
from robustexplain.streams import Streams
from robustexplain.system import System

from .search import Found


@dataclass(frozen=True)
class Attacked:
    """The outcome of an input attack.

    Args:
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        success: ``[B]`` bool, from a fresh forward pass of the real model on ``x``: the prediction is ``goal_class``
            (targeted), or no longer the label (untargeted).
        no_map_gradient: ``[B]`` bool, where the search found the map's gradient to be exactly zero.
    """

    x: Tensor
    success: Tensor
    no_map_gradient: Tensor


@dataclass(frozen=True)
class Attack(ABC):
    """Makes inputs that deceive a system: ``attack(system, x, y, goal_class=None, goal_map=None)``.

    A subclass writes ``_search``; everything at the door and the verdict are here.

    Args:
        seed: of the streams; a sample's own stream depends on it and on the sample alone.
    """

    seed: Natural = field(default=0, kw_only=True)

    needs_maps: ClassVar[bool] = False
    """Whether the attack differentiates the interpreter's maps."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self,
        system: System,
        x: Tensor,
        y: Tensor,
        goal_class: Tensor | None = None,
        goal_map: Tensor | None = None,
    ) -> Attacked:
        """Attack a batch.

        Args:
            system: what is deployed.
            x: benign inputs ``[B, C, H, W]`` in ``[0, 1]``.
            y: ``[B]``, the labels to leave.
            goal_class: ``[B]``, what should be predicted; ``None``: anything but ``y`` (untargeted).
            goal_map: ``[B, H, W]``, the map that should be seen; ``None``: the benign map of the benign prediction.

        Raises:
            InputError: bad tensors, or a goal class equal to the label.
            NotDifferentiableError: the attack needs the gradient of maps that have none.
        """
        self._check(system, x, y, goal_class, goal_map)
        wanted = None if goal_class is None else goal_class.to(x.device, torch.int64)
        goal = Goal(x.detach(), y.to(x.device, torch.int64), wanted)
        if self.needs_maps:
            goal = Goal(goal.x, goal.label, goal.goal_class, _native_goal(system, goal.x, goal_map))
        streams = Streams.of(goal.x, self.seed, type(self).__name__)
        with torch.enable_grad():
            found = self._search(system, goal, streams)
        with torch.no_grad():
            prediction = system.model(found.x).argmax(1)
        hit = prediction != goal.label if goal.goal_class is None else prediction == goal.goal_class
        return Attacked(found.x, hit, found.no_map_gradient)

    def adapted(self, system: System) -> Attack:
        """The same attack by an adversary who knows the defended ``system``; itself, where there is nothing to add."""
        return self

    @abstractmethod
    def _search(self, system: System, goal: Goal, streams: Streams) -> Found:
        """Look for the attacked inputs; arguments are checked already."""

    def _check(self, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None) -> None:
        checks.inputs(x)
        checks.evaluating(system.model)
        with torch.no_grad():
            num_classes = system.model(x[:1]).shape[1]
        checks.classes(y, len(x), num_classes, "y")
        if goal_class is not None:
            checks.classes(goal_class, len(x), num_classes, "goal_class")
            if bool((goal_class.cpu() == y.cpu()).any()):
                raise InputError("goal_class equals the label y for some samples: there is nothing to attack")
        if goal_map is not None:
            checks.maps_like(goal_map, x, "goal_map")
        if self.needs_maps and not system.interpreter.differentiable:
            able = ", ".join(e.name for e in INTERPRETERS if getattr(e.build, "differentiable", False))
            raise NotDifferentiableError(
                f"{type(self).__name__} needs the gradient of the maps, and {type(system.interpreter).__name__} has "
                f"none; interpreters that do: {able}"
            )


def _native_goal(system: System, x: Tensor, goal_map: Tensor | None) -> Tensor:
    """The goal map on the interpreter's own grid; by default the benign map of the benign prediction."""
    with torch.no_grad():
        benign = system.interpreter.explain(x, native=True).maps
    if goal_map is None or goal_map.shape == benign.shape:
        return benign if goal_map is None else goal_map.to(benign)
    wanted = goal_map.to(benign)[:, None]
    size = benign.shape[-2:]
    return F.interpolate(wanted, size=size, mode="bilinear", align_corners=False, antialias=True)[:, 0]
