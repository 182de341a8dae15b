"""Objectives of attacks on one region of the input, and of universal perturbations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..fields import Positive
from ..maps import positive
from ..registry import OBJECTIVES
from .base import Goal, Objective, Observation
from .prediction import Misclassify


@OBJECTIVES.register("leave-region", paper="Subramanya et al. 2019", needs=("gradients",))
@dataclass(frozen=True)
class LeaveRegion(Objective):
    """Share of the map's positive part in the region that the threat model may change, 0 to 1.

    On the interpreter's own grid: ``sum_r m+ / (sum m+ + 1e-10)``, ``m+ = max(m, 0)``, where a cell counts by the share
    of it that the region covers. Subramanya et al. divide the share by the number of cells in the region (16 for their
    patch of 64 pixels on a 14 x 14 grid); the share itself keeps its scale on any grid, so their weight of 0.05 on the
    cross-entropy is 0.8 beside it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """The share, ``[B]``."""
        if seen.maps is None or seen.region is None:
            raise InputError("LeaveRegion needs an observation with maps, and a threat model with a region (a patch)")
        heat = positive(seen.maps)
        covered = F.adaptive_avg_pool2d(seen.region.to(heat)[:, None], (heat.shape[1], heat.shape[2]))[:, 0]
        return (heat * covered).flatten(1).sum(1) / (heat.flatten(1).sum(1) + 1e-10)


@dataclass(frozen=True)
class UntilMet(Objective):
    """Another constraint's loss for the samples that do not meet it, zero for those that do (Subramanya et al. 2019).

    Args:
        of: the constraint.
    """

    of: Objective = field(default_factory=Misclassify)

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``[B]``; the gradient is zero where it is met, too."""
        return torch.where(self.of.met(seen, goal), 0, self.of.loss(seen, goal))

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """Where the other is."""
        return self.of.met(seen, goal)

    def unmet(self, seen: Observation, goal: Goal) -> Tensor:
        """As far as the other is."""
        return self.of.unmet(seen, goal)


@dataclass(frozen=True)
class Capped(Objective):
    """Another objective's loss, at least ``-cap``: no single sample dominates a shared perturbation.

    Shafahi et al. 2020 maximise ``min(cross-entropy, beta)``; beyond it a sample's gradient is zero.

    Args:
        of: the objective; the untargeted cross-entropy is the negative one here.
        cap: ``beta``, nats; 9 for ImageNet.
    """

    of: Objective = field(default_factory=Misclassify)
    cap: Positive = 9.0

    least: ClassVar[float] = -torch.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``max(loss, -cap)``, ``[B]``."""
        loss = self.of.loss(seen, goal)
        return torch.where(loss < -self.cap, -self.cap, loss)

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """Where the other is."""
        return self.of.met(seen, goal)

    def unmet(self, seen: Observation, goal: Goal) -> Tensor:
        """As far as the other is."""
        return self.of.unmet(seen, goal)
