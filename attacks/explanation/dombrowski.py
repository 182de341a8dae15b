"""Attack towards a chosen map with unchanged output (Dombrowski et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from robustexplain.fields import Count, Eps, Fraction, NonNegative, Positive
from robustexplain.objectives import KeepPrediction, MatchMap
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..goals import random_patch_maps
from ..search.directions import BetaSchedule
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import Adam
from ..threat import Linf


@ATTACKS.register(
    "dombrowski", paper="Dombrowski et al. 2019, manipulation method", needs=("gradients", "differentiable maps")
)
@dataclass(frozen=True)
class Dombrowski(Attack):
    """Move the map to a goal map and keep the whole output, by Adam on the image with a softplus surrogate.

    ``weight * mean((N h(x') - N h_t)^2) + keep * ||p(x') - p(x)||^2`` with ``h`` the magnitudes of a map of ``N``
    pixels, divided by their sum. The published prefactors, ``1e11`` of a mean over ``N = 224^2`` pixels and
    ``1e6`` of a mean over 1000 classes, are ``1e11 / N^2 = 39.7`` and ``1e6 / 1000 = 1e3`` here, on every grid and for
    any number of classes. The goal map is the map of another image, or any; default: a random patch.

    Departures from their code: the best iterate on the real network is returned (its nearest map among those whose
    confidence moved by ``tolerance`` or less), not the last; target and benign map and probabilities are the real
    network's, not those of a softplus of ``beta = 1000``; steps are in ``[0, 1]`` pixels (theirs, in units of the
    normalisation's deviation, are about 4.4 times as long).

    Args:
        eps: L-infinity radius; 1 allows any image in ``[0, 1]``, as published.
        steps: iterations.
        step_size: Adam's learning rate, in ``[0, 1]`` pixels; longer than the published 2e-4 to 5e-3 of the deviation,
            which the return of the best iterate allows.
        weight: of the error of the map.
        keep: weight of the change of the probabilities.
        tolerance: largest change of the benign class's probability; 1 requires the label only.
        surrogate: replaces the rectifiers while gradients are computed; ``auto`` is ``softplus`` for maps that are
            gradients and none for others.
        beta: of ``softplus`` at the start.
        beta_end: of ``softplus`` at the end; it grows geometrically.
        adapt: to a defense; against a detector ``evade`` is ``keep``.
    """

    eps: Eps = 1.0
    steps: Count = 1500
    step_size: Positive = 1e-3
    weight: Positive = 39.7
    keep: NonNegative = 1e3
    tolerance: Fraction = 0.05
    surrogate: Surrogate = "auto"
    beta: Positive = 10.0
    beta_end: Positive = 100.0
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True

    def _changes(self, system: System) -> dict[str, Any]:
        return {"adapt": self.adapt.to(system, evade=self.keep or 1.0)}

    def plan(self, system: System) -> Plan:
        """Adam on both errors."""
        match = self.weight * MatchMap("sum", relative=True) + self.keep * KeepPrediction(self.tolerance)
        stage = Stage(match + self.adapt.evasion(system), self.steps, Adam(self.step_size))
        schedule = BetaSchedule(self.beta, self.beta_end)
        smooth = surrogate_for(system.interpreter, self.surrogate, softplus=schedule, auto="softplus")
        return Search(Linf(self.eps), (stage,), self.adapt.direction(smooth))

    def default_goal_map(self, x: Tensor) -> Tensor:
        """A random patch, since the benign map is the start."""
        return random_patch_maps(x, self.seed)
