"""Attacks on prediction and explanation at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from robustexplain.autograd.rectifiers import Smooth
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction, NonNegative, Positive, Radius
from robustexplain.objectives import AgreeEncoder, MatchMap, Misclassify, Objective, Ramp
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..prediction.gradient import ball, step
from ..search.bilevel import Bilevel, BilevelSearch
from ..search.directions import BetaSchedule
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import NormalisedStep, SignStep
from ..threat import Norm
from .member_maps import members_apart


@ATTACKS.register("adv2", paper="Zhang et al. 2020, eq. 3-4, section 3.6", needs=("gradients", "differentiable maps"))
@dataclass(frozen=True)
class ADV2(Attack):
    """Misclassify, and keep the explanation plausible: ``l_prd + lambda l_int`` in a ball (Zhang et al. 2020, eq. 3).

    A warm start minimises the prediction loss alone (section 3.6), then both are minimised. The map loss is the mean
    squared difference on the interpreter's own grid, both maps rescaled to ``[0, 1]`` (masks are not); its weight grows
    linearly, as in the reference code. RTS gets the encoder term. For maps that are gradients (``Gradient``) a
    surrogate replaces the rectifiers, with label smoothing. One pass serves both losses, so the cross-entropy's
    gradient uses the surrogate too, where the reference code spends a second pass on plain ReLU. The returned iterate
    is the one with the nearest map among those that the real system misclassifies with at least ``confidence``.

    Departure: the surrogate is a softplus that approaches the rectifier. With ADV2's smoothed derivative ``h(z)``
    (``surrogate="smooth_gradient"``) maps get less close on every network that we measured for the gradient, its
    product with the input, its averages and aggregates of it, and closer for guided Grad-CAM.

    MASK is the result of an optimisation: it is attacked by :class:`BilevelSearch` (section 3.5). Several interpreters
    are attacked at once through a :class:`~robustexplain.attacks.joint.member_maps.MemberMaps` of them.

    Args:
        eps: radius of the ball; the paper uses 0.031 in L-infinity.
        steps: iterations in all, warm start included (Table 11: 800 to 1200).
        step_size: of one step; the paper uses 1/255.
        decay: step size at the end over that at the start of the joint stage, linear in between. 1 as in the paper:
            the last iterates then oscillate by ``step_size`` in every pixel, which changes gradient maps much.
        weight: ``lambda`` for the *mean* over pixels at the start of the joint stage. In Table 11 it is for a
            sum: 0.204 over a ``7 x 7`` map is 10 here, 0.007 over GRAD's ``56 x 56`` is 22 (with ``pool=4`` at 224
            pixels), and the final 0.05 of the code there is 157. For gradient maps of many pixels 100 works well.
            MASK's two-step update has no weight.
        growth: ``lambda`` at the end over ``lambda`` at the start (the code doubles it).
        warm_start: share of the steps spent on the prediction alone.
        confidence: ``kappa``: iterates below it count only if none reaches it (0.8 on GRAD in the code).
        encoder_weight: of the encoder's cross-entropy for model-guided interpreters (0.1 in Table 11).
        smoothing: ``rho`` of label smoothing at the start, falling to a fifth of it (0.05 to 0.01), for gradient maps
            and MASK, whose gradients vanish where the prediction is confident.
        surrogate: replaces the rectifiers while gradients are computed: ``auto`` is ``softplus`` for gradient maps and
            for MASK (whose steps are gradients too; the paper uses no surrogate there) and none otherwise; ``none``;
            ``smooth_gradient`` is the paper's ``h(z)``.
        beta: of ``softplus`` at the start of the joint stage (against MASK it is 40 throughout).
        beta_end: of ``softplus`` at its end; it grows geometrically. A long search can use a higher value, which is
            closer to the rectifier.
        pool: average-pool maps by this factor before comparing them.
        norm: ``linf`` or ``l2``.
        restarts: number of runs, of which the best counts; all but the first begin at random.
        adapt: to a defense.
        members: against an aggregate of interpreters, match the map of every member instead of the aggregated map;
            without effect on other interpreters.
        mask: settings of the attack on MASK.

    Examples:
        >>> import torch
        >>> import robustexplain as rx
        >>> from robustexplain import attacks, interpreters, models
        >>> model = models.load("small-cnn", num_classes=10, in_channels=1)
        >>> system = rx.System(model, interpreters.GradCAM(model))
        >>> x, y, goal = torch.full((1, 1, 32, 32), 0.5), torch.tensor([3]), torch.tensor([7])
        >>> attacked = attacks.ADV2(eps=8 / 255, steps=4)(system, x, y, goal_class=goal)
        >>> attacked.x.shape, attacked.success.shape
        (torch.Size([1, 1, 32, 32]), torch.Size([1]))
        >>> bool((attacked.x - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    eps: Radius = 0.031
    steps: Count = 1200
    step_size: Positive = 1 / 255
    decay: Fraction = 0.1
    weight: NonNegative = 10.0
    growth: Positive = 2.0
    warm_start: Fraction = 0.25
    confidence: Fraction = 0.8
    encoder_weight: NonNegative = 0.1
    smoothing: Fraction = 0.05
    surrogate: Surrogate = "auto"
    beta: Positive = 5.0
    beta_end: Positive = 40.0
    pool: Count = 1
    norm: Norm = "linf"
    restarts: Count = 1
    adapt: Adaptation = field(default_factory=Adaptation)
    members: bool = False
    mask: Bilevel = field(default_factory=Bilevel)

    needs_maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def looks_at(self, system: System) -> System:
        """With ``members``, the maps of an aggregate's members side by side."""
        return replace(system, interpreter=members_apart(system.interpreter)) if self.members else system

    def _changes(self, system: System) -> dict[str, Any]:
        adapt = self.adapt.to(system)
        if system.interpreter.iterative:
            # The bilevel search uses other random draws in each of its steps ahead already.
            adapt = replace(adapt, draws=self.adapt.draws)
        known = {"adapt": adapt}
        if system.detector is None or self.adapt.evade:
            return known
        return known | {"surrogate": self._surrogate_for_detector(system)}

    def _surrogate_for_detector(self, system: System) -> Surrogate:
        """The surrogate for an attack on a detector's score too.

        A detector may use maps that are gradients. So where ``auto`` gives no surrogate for the system's own map, the
        score gets ``h(z)``, which changes derivatives only: map and score keep their values.
        """
        unused = self.surrogate == "auto" and self._smooth(system) is None
        return "smooth_gradient" if unused else self.surrogate

    def differentiates(self, system: System) -> bool:
        """Whether maps are differentiated; of MASK only the steps are."""
        return not system.interpreter.iterative

    def plan(self, system: System) -> Plan:
        """A warm start on the prediction, then both losses; against MASK the bilevel search."""
        threat, update = ball(self.norm, self.eps), step(self.norm, self.step_size)
        warm = round(self.steps * self.warm_start)
        smooth = self._smooth(system)
        first = Stage(Misclassify(), warm, update)
        if system.interpreter.iterative:
            if self.adapt.draws > 1:
                raise InputError(
                    f"adapt.draws={self.adapt.draws}: against MASK the steps ahead are the draws; use draws=1"
                )
            first = Stage(Misclassify(self.confidence), warm, update)
            return BilevelSearch(
                threat, first, self.prediction(system), self.match(system), self.steps - warm, self.mask,
                smooth, self.adapt.straight, self.restarts,
            )  # fmt: skip
        size = Ramp(self.step_size, self.step_size * self.decay)
        shrinking = SignStep(size) if self.norm == "linf" else NormalisedStep(size)
        stages = (first, Stage(self.objective(system), self.steps - warm, shrinking))
        return Search(threat, stages, self.adapt.direction(smooth), restarts=self.restarts)

    def _smooth(self, system: System) -> Smooth | BetaSchedule | None:
        schedule = BetaSchedule(self.beta, self.beta_end)
        return surrogate_for(system.interpreter, self.surrogate, softplus=schedule, auto="softplus")

    def objective(self, system: System) -> Objective:
        """The objective of the joint stage against ``system``."""
        total = self.prediction(system) + Ramp(self.weight, self.weight * self.growth) * self.match(system)
        return total + self.encoder_weight * AgreeEncoder() if self.encoder_weight else total

    def prediction(self, system: System) -> Objective:
        """The terms of the objective on the prediction and on a detector's score."""
        saturates = system.interpreter.is_gradient or system.interpreter.iterative
        rho = Ramp(self.smoothing, self.smoothing / 5) if saturates else 0.0
        return Misclassify(self.confidence, rho) + self.adapt.evasion(system)

    def match(self, system: System) -> Objective:
        """The term of the objective on the map."""
        return MatchMap(rescale="none" if system.interpreter.unit_range else "minmax", pool=self.pool)
