"""Attacks on prediction and explanation at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from robustexplain.activations import Smooth, SmoothGradient, Softplus
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction, NonNegative, Positive, Radius
from robustexplain.interpreters.base import Interpreter
from robustexplain.objectives import AgreeEncoder, EvadeDetector, MatchMap, Misclassify, Objective, Ramp
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from .base import Attack
from .directions import Backward
from .prediction import Norm, ball, step
from .search import Plan, Search, Stage


@ATTACKS.register("adv2", paper="Zhang et al. 2020, eq. 3-4, section 3.6", needs=("gradients", "differentiable maps"))
@dataclass(frozen=True)
class ADV2(Attack):
    """Misclassify, and keep the explanation plausible: ``l_prd + lambda l_int`` in a ball (Zhang et al. 2020, eq. 3).

    A warm start follows the prediction alone (section 3.6), then both. The map loss is the mean squared difference on
    the interpreter's own grid, both maps rescaled to ``[0, 1]`` (masks as they are); its weight grows linearly, as in
    the reference code. RTS gets the encoder term. Maps that are gradients (``Gradient``) are followed through ADV2's
    smoothed ReLU derivative ``h(z)`` with label smoothing; one pass serves both losses, so the cross-entropy's gradient
    goes through ``h`` too, where the reference code spends a second pass on plain ReLU. The returned iterate is the one
    with the nearest map among those that the real system misclassifies with at least ``confidence``.

    Args:
        eps: radius of the ball; the paper uses 0.031 in L-infinity.
        steps: iterations in all, warm start included (Table 11: 800 to 1200).
        step_size: of one step; the paper uses 1/255.
        weight: ``lambda`` for the *mean* over pixels at the start of the joint stage. Table 11's ``lambda`` weighs a
            sum: 0.204 over a ``7 x 7`` map is 10 here.
        growth: ``lambda`` at the end over ``lambda`` at the start (the code doubles it).
        warm_start: share of the steps spent on the prediction alone.
        confidence: ``kappa``: iterates below it count only if none reaches it (the code asks for 0.8 on GRAD).
        encoder_weight: of the encoder's cross-entropy for model-guided interpreters (0.1 in Table 11).
        smoothing: ``rho`` of label smoothing at the start, going to a fifth of it (0.05 to 0.01), for gradient maps.
        surrogate: what rectifiers compute while directions are sought: ``auto`` takes ``h(z)`` for gradient maps and
            nothing otherwise; ``none``; ``smooth_gradient`` is ``h(z)``; ``softplus`` has ``beta = 10``.
        pool: average-pool maps by this factor before comparing them.
        evade: weight of the detector's soft score; 0 ignores it (see :meth:`adapted`).
        norm: ``linf`` or ``l2``.
        restarts: run this often and keep the best; all but the first begin at random.
        draws: average directions over so many draws of what is random in the system (Athalye et al. 2018).
        straight: go straight through rounding inside the model.
    """

    eps: Radius = 0.031
    steps: Count = 1200
    step_size: Positive = 1 / 255
    weight: NonNegative = 10.0
    growth: Positive = 2.0
    warm_start: Fraction = 0.25
    confidence: Fraction = 0.8
    encoder_weight: NonNegative = 0.1
    smoothing: Fraction = 0.05
    surrogate: Literal["auto", "none", "smooth_gradient", "softplus"] = "auto"
    pool: Count = 1
    evade: NonNegative = 0.0
    norm: Norm = "linf"
    restarts: Count = 1
    draws: Count = 1
    straight: bool = False

    needs_maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    def adapted(self, system: System) -> ADV2:
        """With the detector's soft score in the loss, if there is a detector; steps and restarts stay as they are.

        A detector may look at maps that are gradients, so its score is followed through ``h(z)`` as well.
        """
        if system.detector is None or self.evade:
            return self
        return replace(self, evade=1.0, surrogate="smooth_gradient" if self.surrogate == "auto" else self.surrogate)

    def plan(self, system: System) -> Plan:
        """A warm start on the prediction, then both."""
        warm = round(self.steps * self.warm_start)
        update = step(self.norm, self.step_size)
        stages = (Stage(Misclassify(), warm, update), Stage(self.objective(system), self.steps - warm, update))
        direction = Backward(self._surrogate(system.interpreter), self.straight, self.draws)
        return Search(ball(self.norm, self.eps), stages, direction, restarts=self.restarts)

    def objective(self, system: System) -> Objective:
        """What the joint stage minimises against ``system``."""
        interpreter = system.interpreter
        second_order = interpreter.second_order
        rho = Ramp(self.smoothing, self.smoothing / 5) if second_order else 0.0
        match = MatchMap(rescale="none" if interpreter.bounded else "minmax", pool=self.pool)
        total = Misclassify(self.confidence, rho) + Ramp(self.weight, self.weight * self.growth) * match
        if self.encoder_weight:
            total = total + self.encoder_weight * AgreeEncoder()
        if self.evade:
            if system.detector is None:
                raise InputError("evade > 0 needs a system with a detector")
            total = total + self.evade * EvadeDetector(system.detector.soft_threshold)
        return total

    def _surrogate(self, interpreter: Interpreter) -> Smooth | None:
        if self.surrogate == "auto":
            return SmoothGradient() if interpreter.second_order else None
        return {"none": None, "smooth_gradient": SmoothGradient(), "softplus": Softplus()}[self.surrogate]
