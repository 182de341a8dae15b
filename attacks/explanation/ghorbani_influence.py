"""The attack on influence functions, explanations by training examples (Ghorbani et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.fields import Count, Eps, NonNegative
from robustexplain.interpreters import Influence, Reference
from robustexplain.objectives import Goal, KeepPrediction, Objective, Observation
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..base import Attack
from ..search.loop import Plan, Search, Stage
from ..search.updates import SignStep
from ..threat import Linf


@dataclass(frozen=True)
class DropInfluence(Objective):
    """Summed influence of the ``k`` training images that had the highest influence on the benign input.

    Args:
        influence: computes the scores for a model and its training images.
        k: how many images.
    """

    influence: Influence | None = None
    k: Count = 3

    constraint: ClassVar[bool] = False
    least: ClassVar[float] = -torch.inf

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``sum over the benign top k of score_i(x')``, for the loss of the benign prediction."""
        if self.influence is None:
            raise InputError("DropInfluence needs an Influence: a model and its training images")
        # The solve does not converge at half precision.
        with torch.autocast(seen.x.device.type, enabled=False):
            top = self.influence.top(goal.x, self.k, goal.label).indices
            return self.influence.scores(seen.x, goal.label).gather(1, top).sum(1)


@ATTACKS.register(
    "ghorbani-influence", paper="Ghorbani et al. 2019, section 3 (influence functions)", needs=("gradients", "data")
)
@dataclass(frozen=True)
class GhorbaniInfluence(Attack):
    """A sign step that lowers the influence of the training images ranked highest, and keeps the prediction.

    ``x - eps sign(grad sum over the top k of score_i(x))``. Influence is not a map, so this attack does not use
    the system's interpreter. It holds an :class:`~robustexplain.interpreters.Influence` of the attacked model, made by
    :meth:`fitted` (from training images and the settings below) or given to :meth:`about`. A step that changes the
    label does not count, as in the paper: the input is then returned unchanged.

    Args:
        eps: L-infinity radius; the paper takes 8/255.
        k: number of training images.
        steps: 1 as published; with more, each of size ``eps / steps``, the gradient is computed again at every step.
        parameters: ``head`` (as published) or ``all``, see :class:`~robustexplain.interpreters.Influence`.
        curvature: ``gauss_newton`` or ``hessian``.
        damping: of the curvature.
    """

    eps: Eps = 8 / 255
    k: Count = 3
    steps: Count = 1
    parameters: Literal["head", "all"] = "head"
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    damping: NonNegative = 1e-3

    influence: Influence | None = field(default=None, init=False, repr=False, compare=False)

    keeps_prediction: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    def fitted(self, system: System, x: Tensor, y: Tensor) -> GhorbaniInfluence:
        """The attack on the influence of training images ``x`` with labels ``y`` on ``system.model``."""
        reference = Reference(x, y)
        return self.about(Influence(system.model, reference, self.parameters, self.curvature, self.damping))

    def about(self, influence: Influence) -> GhorbaniInfluence:
        """The attack on the given influence, whose settings replace those of this attack."""
        made = type(self)(**{f.name: getattr(self, f.name) for f in fields(self) if f.init})
        object.__setattr__(made, "influence", influence)
        return made

    def plan(self, system: System) -> Plan:
        """Sign steps on the scores; the label is a constraint.

        Raises:
            InputError: not fitted, fitted to another model, or ``k`` above the number of training images.
        """
        if self.influence is None:
            raise InputError("GhorbaniInfluence needs training images: call fitted(system, x, y), or about(influence)")
        if self.influence.model is not system.model:
            raise InputError("this attack was fitted to another model object than the system deploys; fit it again")
        stage = self._stage()
        return Search(Linf(self.eps), (stage,))

    def summaries(self) -> tuple[str, str, str]:
        """Threat model, objective and search, fitted or not."""
        return Search(Linf(self.eps), (self._stage(),)).summaries()

    def _stage(self) -> Stage:
        objective = DropInfluence(self.influence, self.k) + 0.0 * KeepPrediction()
        return Stage(objective, self.steps, SignStep(self.eps / self.steps))
