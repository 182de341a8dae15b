"""Attacks along estimated gradients: they ask the system for logits and maps, and look inside neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustexplain.errors import FieldError
from robustexplain.fields import Count, NonNegative, Positive, Radius
from robustexplain.objectives import Margin, MatchMap, Misclassify, Objective
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from .base import Attack
from .directions import Estimate
from .prediction import Norm, ball, step
from .search import Plan, Search, Stage
from .updates import Adam, Update


@ATTACKS.register("nes", paper="Ilyas et al. 2018, Algorithm 1, section 3.2")
@dataclass(frozen=True)
class NES(Attack):
    """Sign descent on the cross-entropy along gradients estimated from antithetic normal draws.

    A sample stops at its first success, unless the map counts too (``joint``). The authors' code adds momentum and
    lowers the step size on plateaus, which the paper's algorithm does not.

    Args:
        eps: radius of the ball (paper: 0.05 in L-infinity).
        step_size: of one step (paper: 0.01).
        sigma: how far from the image the system is asked (paper: 0.001).
        samples: inputs shown for each estimate (paper: 50), rounded up to whole pairs.
        max_queries: inputs shown for one sample, at most; with ``samples`` it decides the number of steps.
        joint: also match the goal map, by its values alone: interpreters without a gradient will do.
        weight: of the mean squared difference of the min-max rescaled maps, if ``joint``.
        norm: ``linf`` (sign steps) or ``l2`` (steps of that length along the estimate).
    """

    eps: Radius = 0.05
    step_size: Positive = 0.01
    sigma: Positive = 0.001
    samples: Count = 50
    max_queries: Count = 10_000
    joint: bool = False
    weight: NonNegative = 10.0
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle(self)

    def differentiates(self, system: System) -> bool:
        """The values of maps are enough."""
        return False

    def plan(self, system: System) -> Plan:
        """Steps along the estimate."""
        return _search(self, "nes", Misclassify(), step(self.norm, self.step_size))


@ATTACKS.register("spsa", paper="Uesato et al. 2018, section 3.3")
@dataclass(frozen=True)
class SPSA(Attack):
    """Adam on the logit margin along gradients estimated from antithetic draws of random signs.

    A sample stops at its first success, unless the map counts too (``joint``).

    Args:
        eps: radius of the ball.
        step_size: Adam's learning rate (paper: 0.01).
        sigma: ``delta``, how far from the image the system is asked (paper: 0.01).
        samples: inputs shown for each estimate (the paper goes up to 8192), rounded up to whole pairs.
        max_queries: inputs shown for one sample, at most; with ``samples`` it decides the number of steps.
        joint: also match the goal map, by its values alone: interpreters without a gradient will do.
        weight: of the mean squared difference of the min-max rescaled maps, if ``joint``.
        norm: ``linf`` or ``l2``.
    """

    eps: Radius = 0.05
    step_size: Positive = 0.01
    sigma: Positive = 0.01
    samples: Count = 128
    max_queries: Count = 10_000
    joint: bool = False
    weight: NonNegative = 10.0
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle(self)

    def differentiates(self, system: System) -> bool:
        """The values of maps are enough."""
        return False

    def plan(self, system: System) -> Plan:
        """Adam along the estimate."""
        return _search(self, "spsa", Margin(), Adam(self.step_size))


def _settle(attack: NES | SPSA) -> None:
    """What both check; and whether maps are looked at, which a field decides here and the class's flag elsewhere."""
    ball(attack.norm, attack.eps)
    object.__setattr__(attack, "needs_maps", attack.joint)
    if attack.max_queries <= _of_a_step(attack):
        problem = f"must pay for a step of {_of_a_step(attack)} and a last look, got {attack.max_queries}"
        raise FieldError(type(attack).__name__, "max_queries", problem)


def _of_a_step(attack: NES | SPSA) -> int:
    """Whole pairs, and a look at where the sample stands."""
    return 2 * ((attack.samples + 1) // 2) + 1


def _search(attack: NES | SPSA, kind: Literal["nes", "spsa"], prediction: Objective, update: Update) -> Plan:
    objective = prediction + attack.weight * MatchMap() if attack.joint else prediction
    stage = Stage(objective, (attack.max_queries - 1) // _of_a_step(attack), update)
    direction = Estimate(kind, attack.samples, attack.sigma)
    return Search(ball(attack.norm, attack.eps), (stage,), direction, judge_every=1, early_stop=not attack.joint)
