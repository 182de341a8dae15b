"""Attacks on prediction and explanation at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from robustexplain.autograd.rectifiers import Smooth
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction, NonNegative, Positive, Radius
from robustexplain.interpreters import Mask
from robustexplain.objectives import AgreeEncoder, Goal, MatchMap, Misclassify, Objective, Ramp
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import evasion
from ..base import Attack
from ..prediction.gradient import Norm, ball, step
from ..search.bilevel import Bilevel, BilevelSearch
from ..search.directions import BetaSchedule, GradientDirection
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import NormalisedStep, SignStep
from .member_maps import MemberMaps, members_apart


@ATTACKS.register("adv2", paper="Zhang et al. 2020, eq. 3-4, section 3.6", needs=("gradients", "differentiable maps"))
@dataclass(frozen=True)
class ADV2(Attack):
    """Misclassify, and keep the explanation plausible: ``l_prd + lambda l_int`` in a ball (Zhang et al. 2020, eq. 3).

    A warm start follows the prediction alone (section 3.6), then both. The map loss is the mean squared difference on
    the interpreter's own grid, both maps rescaled to ``[0, 1]`` (masks as they are); its weight grows linearly, as in
    the reference code. RTS gets the encoder term. Maps that are gradients (``Gradient``) are followed through a
    stand-in for the rectifiers, with label smoothing; one pass serves both losses, so the cross-entropy's gradient goes
    through it too, where the reference code spends a second pass on plain ReLU. The returned iterate is the one with
    the nearest map among those that the real system misclassifies with at least ``confidence``.

    Departure: the stand-in is a softplus that turns into the rectifier. ADV2's smoothed derivative ``h(z)``
    (``surrogate="smooth_gradient"``) follows the gradient, its product with the input, its averages and aggregates of
    it less far on every network that we measured, and guided Grad-CAM further.

    MASK is the end of an optimisation: it is attacked by :class:`BilevelSearch` (section 3.5), and any set of
    interpreters at once on a :class:`~robustexplain.attacks.joint.member_maps.MemberMaps` of them.

    Args:
        eps: radius of the ball; the paper uses 0.031 in L-infinity.
        steps: iterations in all, warm start included (Table 11: 800 to 1200).
        step_size: of one step; the paper uses 1/255.
        decay: step size at the end over that at the start of the joint stage, linear in between. The paper's steps stay
            as they are (1): the last iterates then jump about the nearest map by ``step_size`` in every pixel, which
            gradient maps do not forgive.
        weight: ``lambda`` for the *mean* over pixels at the start of the joint stage. Table 11's ``lambda`` weighs a
            sum: 0.204 over a ``7 x 7`` map is 10 here, 0.007 over GRAD's ``56 x 56`` is 22 (with ``pool=4`` at 224
            pixels), and the 0.05 at which the code ends there 157. Gradient maps of many pixels take 100 well. MASK's
            two-step update has no weight.
        growth: ``lambda`` at the end over ``lambda`` at the start (the code doubles it).
        warm_start: share of the steps spent on the prediction alone.
        confidence: ``kappa``: iterates below it count only if none reaches it (the code asks for 0.8 on GRAD).
        encoder_weight: of the encoder's cross-entropy for model-guided interpreters (0.1 in Table 11).
        smoothing: ``rho`` of label smoothing at the start, going to a fifth of it (0.05 to 0.01), for gradient maps and
            MASK, which see nothing where the prediction is sure.
        surrogate: what rectifiers compute while directions are sought: ``auto`` takes ``softplus`` for gradient maps
            and for MASK (whose steps are gradients too; the paper has nothing there) and nothing otherwise; ``none``;
            ``smooth_gradient`` is ``h(z)``, the paper's.
        beta: of ``softplus`` at the start of the joint stage (against MASK it is 40 throughout) ...
        beta_end: ... and at its end; it grows geometrically. A long search affords a higher one, which is nearer to the
            rectifier.
        pool: average-pool maps by this factor before comparing them.
        evade: weight of the detector's soft score; 0 ignores it (see :meth:`adapted`).
        norm: ``linf`` or ``l2``.
        restarts: run this often and keep the best; all but the first begin at random.
        draws: average directions over so many draws of what is random in the system (Athalye et al. 2018).
        straight: go straight through rounding inside the model.
        members: against an interpreter made of several (an aggregate), match the map of every member instead of the
            one map that is shown; others are attacked as they are.
        mask: how MASK is attacked.

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
    evade: NonNegative = 0.0
    norm: Norm = "linf"
    restarts: Count = 1
    draws: Count = 1
    straight: bool = False
    members: bool = False
    mask: Bilevel = field(default_factory=Bilevel)

    needs_maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def looks_at(self, system: System) -> System:
        """With ``members``, the maps of an aggregate's members side by side."""
        return replace(system, interpreter=members_apart(system.interpreter)) if self.members else system

    def adapted(self, system: System) -> ADV2:
        """With the detector in the loss, if there is one (see :func:`~.evasion.evasion`); steps and restarts stay.

        A detector may look at maps that are gradients, so its score is followed through a stand-in where the system's
        own map needs none: through ``h(z)``, which leaves that map and the score as they are.
        """
        if system.detector is None or self.evade:
            return self
        free = self.surrogate == "auto" and self._stand_in(system) is None
        return replace(self, evade=1.0, surrogate="smooth_gradient" if free else self.surrogate)

    def differentiates(self, system: System) -> bool:
        """Whether the maps themselves are differentiated: MASK's are not, its steps are."""
        return not isinstance(system.interpreter, Mask)

    def plan(self, system: System) -> Plan:
        """A warm start on the prediction, then both; against MASK the bilevel form of it."""
        threat, update = ball(self.norm, self.eps), step(self.norm, self.step_size)
        warm = round(self.steps * self.warm_start)
        smooth = self._stand_in(system)
        first = Stage(Misclassify(), warm, update)
        if isinstance(system.interpreter, Mask):
            if self.draws > 1:
                raise InputError(f"draws={self.draws}: against MASK the steps ahead are the draws; use draws=1")
            first = Stage(Misclassify(self.confidence), warm, update)
            return BilevelSearch(
                threat, first, self.prediction(system), self.match(system), self.steps - warm, self.mask,
                smooth, self.straight, self.restarts,
            )  # fmt: skip
        size = Ramp(self.step_size, self.step_size * self.decay)
        shrinking = SignStep(size) if self.norm == "linf" else NormalisedStep(size)
        stages = (first, Stage(self.objective(system), self.steps - warm, shrinking))
        return Search(threat, stages, GradientDirection(smooth, self.straight, self.draws), restarts=self.restarts)

    def _stand_in(self, system: System) -> Smooth | BetaSchedule | None:
        hardening = BetaSchedule(self.beta, self.beta_end)
        return surrogate_for(system.interpreter, self.surrogate, softplus=hardening, auto="softplus")

    def objective(self, system: System) -> Objective:
        """What the joint stage minimises against ``system``."""
        total = self.prediction(system) + Ramp(self.weight, self.weight * self.growth) * self.match(system)
        return total + self.encoder_weight * AgreeEncoder() if self.encoder_weight else total

    def prediction(self, system: System) -> Objective:
        """What it minimises of the prediction, and of a detector's score."""
        saturates = system.interpreter.is_gradient or isinstance(system.interpreter, Mask)
        rho = Ramp(self.smoothing, self.smoothing / 5) if saturates else 0.0
        return Misclassify(self.confidence, rho) + evasion(self.evade, system)

    def match(self, system: System) -> Objective:
        """What it minimises of the map."""
        return MatchMap(rescale="none" if system.interpreter.unit_range else "minmax", pool=self.pool)

    def _goal(self, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None) -> Goal:
        if goal_map is not None and isinstance(system.interpreter, MemberMaps):
            goal_map = system.interpreter.wanted(goal_map.to(x), x)
        return super()._goal(system, x, y, goal_class, goal_map)
