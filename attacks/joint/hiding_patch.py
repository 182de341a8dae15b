"""Hidden patches: they change the prediction and get no attribution in the explanation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from robustexplain.fields import Count, Natural, NonNegative, Positive
from robustexplain.objectives import LeaveRegion, Misclassify, Objective, UntilMet
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..prediction.patch import PATCH_64_OF_224, Patch, Place, Size
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.universal import Fitted, UniversalSearch, fit_universal
from ..search.updates import SignStep


def hide(weight: float) -> Objective:
    """``share of heat in the patch + weight * cross-entropy``, the latter while the prediction is not as wanted."""
    return LeaveRegion() + weight * UntilMet(Misclassify())


@ATTACKS.register("hiding-patch", paper="Subramanya et al. 2019", needs=("gradients", "differentiable maps"))
@dataclass(frozen=True)
class HidingPatch(Attack):
    """Patch that misclassifies and lowers the attribution of its own pixels (Subramanya et al. 2019).

    Minimises the share of the map's positive heat in the patch's cells, on the interpreter's own grid, plus the
    cross-entropy for as long as the prediction is not as wanted. The class explained is the goal class, untargeted the
    currently predicted class. Any differentiable interpreter can be attacked; the paper's is Grad-CAM.

    Departures: the returned iterate is the one with the least heat in the patch among those predicted as wanted, where
    the code takes the last; the texture is kept in ``[0, 1]``, where the code clips only the composed image and the
    texture can leave the range; the start is grey, in the code the data set's mean colour.

    Args:
        size: side of the square patch, a share of the image's shorter side (64 of 224 pixels).
        place: ``top-left`` as in the code, ``center``, or ``random`` (drawn once for each image).
        steps: iterations.
        step_size: of one sign step; the code's 0.005 in units of the normalised image is about 0.005 * 0.225 here.
        weight: of the cross-entropy, beside a share of heat between 0 and 1. The code's 0.05 is relative to that
            share divided by 16 cells.
        surrogate: replaces the rectifiers while gradients are computed: ``auto`` is ADV2's ``h(z)`` for maps that are
            themselves gradients and none otherwise; ``none``; ``smooth_gradient``; ``softplus`` (``beta = 10``).
        adapt: to a defense; ``draws`` also vary the place.
    """

    size: Size = PATCH_64_OF_224
    place: Place = "top-left"
    steps: Count = 750
    step_size: Positive = 0.005 * 0.225
    weight: NonNegative = 0.05 * 16
    surrogate: Surrogate = "auto"
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_maps: ClassVar[bool] = True
    random_threat: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        """Sign descent on both losses."""
        stage = Stage(hide(self.weight) + self.adapt.evasion(system), self.steps, SignStep(self.step_size))
        direction = self.adapt.direction(surrogate_for(system.interpreter, self.surrogate))
        return Search(Patch(self.size, "square", self.place), (stage,), direction)


@ATTACKS.register(
    "universal-hiding-patch",
    paper="Subramanya et al. 2019, the universal form",
    needs=("gradients", "differentiable maps", "data"),
)
@dataclass(frozen=True)
class UniversalHidingPatch(Attack):
    """One patch for all images that misclassifies them and lowers the attribution of its own pixels.

    The losses of :class:`HidingPatch`, averaged over mini-batches of images; the texture is the last iterate. The code
    of the paper has no universal form, so the number and size of steps, the batch size and the larger weight (one
    texture must change the prediction of many images) are ours.

    The attack is computed by :meth:`fitted`; the texture is ``fitted.applied.variable``, ``[1, C, s, s]``.

    Args:
        size: side of the square patch, a share of the image's shorter side.
        place: ``top-left``, ``center``, or ``random`` (drawn for each image and step).
        steps: mini-batches.
        step_size: of one sign step.
        weight: of the cross-entropy, for the images that are not predicted as wanted.
        batch_size: images per step.
        surrogate: replaces the rectifiers while gradients are computed: see :class:`HidingPatch`.
        goal_class: the class to be predicted for every image; ``None``: any but its label. Success depends on the goal
            of the call.
        adapt: to a defense; ``draws`` also vary each image's place.
    """

    size: Size = PATCH_64_OF_224
    place: Place = "top-left"
    steps: Count = 500
    step_size: Positive = 2 / 255
    weight: NonNegative = 2.0
    batch_size: Count = 16
    surrogate: Surrogate = "auto"
    goal_class: Natural | None = None
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_data: ClassVar[bool] = True
    needs_maps: ClassVar[bool] = True
    random_threat: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        """Mini-batch sign descent on both losses."""
        threat = Patch(self.size, "square", self.place)
        direction = self.adapt.direction(surrogate_for(system.interpreter, self.surrogate))
        aim, update = hide(self.weight) + self.adapt.evasion(system), SignStep(self.step_size)
        return UniversalSearch(threat, aim, self.steps, update, self.batch_size, direction)

    def fitted(self, system: System, x: Tensor, y: Tensor) -> Fitted:
        """The attack with its patch computed on ``x`` ``[N, C, H, W]`` with labels ``y`` ``[N]``.

        Raises:
            InputError: bad tensors, or a goal class out of range.
            NotDifferentiableError: the interpreter's maps have no gradient.
        """
        return fit_universal(self, system, x, y, self.goal_class)
