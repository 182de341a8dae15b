"""Black-box attacks along estimated gradients: they use logits and maps of the system, but no gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustexplain.errors import FieldError
from robustexplain.fields import Count, NonNegative, Positive, Radius
from robustexplain.objectives import Margin, MatchMap, Misclassify, Objective
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..base import Attack
from ..search.directions import EstimatedGradient
from ..search.loop import Plan, Search, Stage
from ..search.updates import Adam, Update
from ..threat import Norm
from .gradient import ball, step


@dataclass(frozen=True)
class _EstimatedGradientAttack(Attack):
    """Steps along estimated gradients within a query budget; without ``joint`` a sample stops at its first success.

    Args:
        eps: radius of the ball.
        step_size: of one step.
        sigma: scale of the random offsets at which the system is queried.
        samples: queries for each estimate, rounded up to whole pairs.
        max_queries: most queries for one sample; with ``samples`` it determines the number of steps.
        joint: also match the goal map, for which interpreters need no gradient.
        weight: of the mean squared difference of the min-max rescaled maps, if ``joint``.
        norm: ``linf`` or ``l2``.
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
        ball(self.norm, self.eps)
        if self.max_queries <= self._queries_per_step:
            problem = f"must pay for a step of {self._queries_per_step} and a last look, got {self.max_queries}"
            raise FieldError(type(self).__name__, "max_queries", problem)

    @property
    def needs_maps(self) -> bool:  # type: ignore[override]
        """Whether the map is attacked too."""
        return self.joint

    def differentiates(self, system: System) -> bool:
        """Never: it uses the maps' values only."""
        return False

    @property
    def _queries_per_step(self) -> int:
        # Whole pairs, and one evaluation of the iterate.
        return 2 * ((self.samples + 1) // 2) + 1

    def _search(self, kind: Literal["nes", "spsa"], prediction: Objective, update: Update) -> Plan:
        objective = prediction + self.weight * MatchMap() if self.joint else prediction
        stage = Stage(objective, (self.max_queries - 1) // self._queries_per_step, update)
        direction = EstimatedGradient(kind, self.samples, self.sigma)
        return Search(ball(self.norm, self.eps), (stage,), direction, evaluate_every=1, early_stop=not self.joint)


@ATTACKS.register("nes", paper="Ilyas et al. 2018, Algorithm 1, section 3.2")
@dataclass(frozen=True)
class NES(_EstimatedGradientAttack):
    """Sign descent on the cross-entropy along gradients estimated from antithetic normal draws.

    The fields are those of :class:`_EstimatedGradientAttack`, at the paper's values; in L2 a step has length
    ``step_size`` along the estimate. The authors' code adds momentum and lowers the step size on plateaus, which the
    paper's algorithm does not.
    """

    def plan(self, system: System) -> Plan:
        """Steps along the estimate."""
        return self._search("nes", Misclassify(), step(self.norm, self.step_size))


@ATTACKS.register("spsa", paper="Uesato et al. 2018, section 3.3")
@dataclass(frozen=True)
class SPSA(_EstimatedGradientAttack):
    """Adam on the logit margin along gradients estimated from antithetic draws of random signs.

    The fields are those of :class:`_EstimatedGradientAttack`; ``step_size`` is Adam's learning rate. The paper uses up
    to 8192 queries for an estimate.
    """

    sigma: Positive = 0.01
    samples: Count = 128

    def plan(self, system: System) -> Plan:
        """Adam along the estimate."""
        return self._search("spsa", Margin(), Adam(self.step_size))
