"""Sign steps on the map as it is shown, with the prediction as a constraint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from robustexplain import maps as ops
from robustexplain.fields import Count, Eps, Fraction, NonNegative, Positive
from robustexplain.interpreters.base import Explanation
from robustexplain.interpreters.composed.base import Wrapper
from robustexplain.objectives import Decay, Lead, LeaveMap, MatchMap, Objective
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..search.directions import BetaSchedule
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import MomentumStep
from ..threat import Linf

Aim = Literal["forge", "match", "move"]
"""``forge``: another prediction, the benign map (or a goal map). ``match``: the benign prediction, a goal map.
``move``: the benign prediction, a map far from the benign one."""


@dataclass(frozen=True, eq=False)
class Shown(Wrapper):
    """An interpreter whose own grid is that of the input: attacks then compare maps as they are shown and judged."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        found = self.base._explain(x, target, graph)
        return found._replace(maps=ops.resize(found.maps, x.shape[-2:]))


@ATTACKS.register(
    "map-pgd",
    paper="Madry et al. 2018 on a map's distance; Yu et al. 2020, Algorithm 1",
    needs=("gradients", "differentiable maps"),
)
@dataclass(frozen=True)
class MapPGD(Attack):
    """Minimise the distance of the map as it is shown, with the prediction as a constraint alone.

    Sign steps with momentum that shrink geometrically. The gradients of constraint and distance are each at unit
    length, and the distance's has no part against the constraint: there is no weight to choose. Unlike in
    :class:`ADV2` and :class:`Dombrowski`, probabilities are free as long as the prediction is as wanted, and maps are
    compared at the input's size and rescaled to ``[0, 1]``, as they are judged.

    Args:
        eps: L-infinity radius.
        aim: ``forge`` (another prediction, the benign map or a goal map), ``match`` (the benign prediction and a goal
            map) or ``move`` (the benign prediction, a map far from the benign one).
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

    eps: Eps = 8 / 255
    aim: Aim = "forge"
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

    needs_maps: ClassVar[bool] = True

    @property
    def keeps_prediction(self) -> bool:  # type: ignore[override]
        """Unless it forges."""
        return self.aim != "forge"

    @property
    def moves_map(self) -> bool:  # type: ignore[override]
        """Whether the map should differ from the benign one."""
        return self.aim == "move"

    def _changes(self, system: System) -> dict[str, Any]:
        known = {"adapt": self.adapt.to(system)}
        if system.detector is None or self.adapt.evade or self.surrogate != "auto" or system.interpreter.is_gradient:
            return known
        # As in ADV2: a detector's score may come of maps that are gradients.
        return known | {"surrogate": "smooth_gradient"}

    def reaching(self) -> MapPGD:
        """With the aim to match a map."""
        return replace(self, aim="match")

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
