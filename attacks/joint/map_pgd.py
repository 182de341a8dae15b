"""Sign steps on the map as it is shown, with the prediction as a constraint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from robustexplain.fields import Count, Fraction, NonNegative, Positive
from robustexplain.objectives import Decay, Lead, LeaveMap, MatchMap, Objective
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..search.directions import BetaSchedule
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import MomentumStep
from ..threat import Linf
from .aimed import Aimed, Shown


@ATTACKS.register(
    "map-pgd",
    paper="Madry et al. 2018 on a map's distance; Yu et al. 2020, Algorithm 1",
    needs=("gradients", "differentiable maps"),
)
@dataclass(frozen=True)
class MapPGD(Aimed):
    """Minimise the distance of the map as it is shown, with the prediction as a constraint alone.

    Sign steps with momentum that shrink geometrically. The gradients of constraint and distance are each at unit
    length, and the distance's has no part against the constraint: there is no weight to choose. Unlike in
    :class:`ADV2` and :class:`Dombrowski`, probabilities are free as long as the prediction is as wanted, and maps are
    compared at the input's size and rescaled to ``[0, 1]``, as they are judged.

    Args:
        steps: iterations.
        first_step: size of the first step, as a share of ``eps``.
        last_step: size of the last one.
        momentum: share of the last direction that is kept.
        slack: lead of the wanted class, in logits, above which the constraint is left alone.
        surrogate: replaces the rectifiers while gradients are computed; ``auto`` is ``softplus`` for gradient maps.
        beta: of ``softplus`` at the start.
        beta_end: of ``softplus`` at the end; it grows geometrically.
        evaluate_every: with a surrogate, the real system is evaluated every so many steps.
        random_start: begin at a random input of the ball; always so if the map is moved, which has no gradient at the
            benign input.
        restarts: number of runs, of which the best counts; all but the first begin at random.
        adapt: to a defense.
    """

    steps: Count = 100
    first_step: Positive = 0.1
    last_step: Positive = 0.005
    momentum: Fraction = 0.75
    slack: NonNegative = 0.5
    surrogate: Surrogate = "auto"
    beta: Positive = 5.0
    beta_end: Positive = 100.0
    evaluate_every: Count = 5
    random_start: bool = False
    restarts: Count = 1
    adapt: Adaptation = field(default_factory=Adaptation)

    def _changes(self, system: System) -> dict[str, Any]:
        known = {"adapt": self.adapt.to(system)}
        if system.detector is None or self.adapt.evade or self.surrogate != "auto" or system.interpreter.is_gradient:
            return known
        # As in ADV2: a detector's score may come of maps that are gradients.
        return known | {"surrogate": "smooth_gradient"}

    def looks_at(self, system: System) -> System:
        """The maps at the size of the input."""
        return replace(system, interpreter=Shown(system.model, system.interpreter))

    def objective(self, system: System) -> Objective:
        """Prediction and no alarm as constraints, and the map."""
        away: Objective = LeaveMap() if self.moves_map else MatchMap()
        return Lead(self.slack, self.keeps_prediction) + self.adapt.evasion(system) + away

    def plan(self, system: System) -> Plan:
        """Sign steps with momentum along balanced gradients."""
        size = Decay(self.eps * self.first_step, self.eps * self.last_step)
        stage = Stage(self.objective(system), self.steps, MomentumStep(size, self.momentum))
        schedule = BetaSchedule(self.beta, self.beta_end)
        smooth = surrogate_for(system.interpreter, self.surrogate, softplus=schedule, auto="softplus")
        direction = replace(self.adapt.direction(smooth), balanced=True)
        at_random = self.random_start or self.moves_map
        return Search(
            Linf(self.eps), (stage,), direction, self.evaluate_every, random_start=at_random, restarts=self.restarts
        )
