"""Base class of the attacks on inputs."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from robustexplain import checks
from robustexplain.autograd.second_derivatives import named_derivatives
from robustexplain.checks import Kind
from robustexplain.door import admit, answer
from robustexplain.errors import InputError, NotDifferentiableError
from robustexplain.fields import Natural, check_fields
from robustexplain.interpreters import GradCAM
from robustexplain.interpreters.base import usable_by_autograd
from robustexplain.interpreters.composed.base import innermost
from robustexplain.metrics import hit
from robustexplain.models import build
from robustexplain.objectives import Goal
from robustexplain.objectives.confident import extreme, scale_of
from robustexplain.random_streams import Streams
from robustexplain.registry import INTERPRETERS
from robustexplain.system import System

from .adaptive import Adaptation
from .known import Known
from .search.loop import Plan, SearchResult


@dataclass(frozen=True)
class Attacked:
    """The result of an input attack, one entry per sample.

    Args:
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        success: bool, from a fresh forward pass of the real model on ``x``: the prediction is ``goal_class``
            (targeted), no longer the label (untargeted), or still the benign one (attacks that keep the prediction).
        zero_direction: bool, where the search's first direction was exactly zero: the gradient of the map, or every
            difference of a gradient estimate.
        stalled: bool, where the objective never fell below its value at the start.
        surrogate_misled: bool, where it stalled on the real system although it fell on the surrogate.
        queries: int64, number of inputs evaluated by the system.
        member: int64, whose input it is, by place among an ensemble's ``names``; ``None`` for a single attack.
    """

    x: Tensor
    success: Tensor
    zero_direction: Tensor
    stalled: Tensor
    surrogate_misled: Tensor
    queries: Tensor
    member: Tensor | None = None


@dataclass(frozen=True)
class Attack(ABC):
    """Makes inputs that deceive a system: ``attack(system, x, y, goal_class=None, goal_map=None)``.

    A subclass implements ``plan``; this class checks the arguments and decides about success.

    Args:
        seed: of all random draws. Each sample has its own random stream, which depends on the seed and that sample
            alone.
    """

    seed: Natural = field(default=0, kw_only=True)

    needs_maps: ClassVar[bool] = False
    """Whether the attack uses the interpreter's maps."""
    keeps_prediction: ClassVar[bool] = False
    """Whether the prediction should not change (the attack then takes no goal class)."""
    moves_map: ClassVar[bool] = False
    """Whether the map should differ from the benign one, instead of resembling a goal map."""
    needs_data: ClassVar[bool] = False
    """Whether the attack must be fitted on the adversary's images before it can run: see :meth:`fitted`."""
    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    """The kinds of inputs that the attack takes; most change pixels in ``[0, 1]``."""
    knows_defense: ClassVar[bool] = False
    """Whether the adversary is one who knows the defense, unless a recipe says otherwise."""
    control: ClassVar[bool] = False
    """Whether this is a control without a search: attacks must do better, and a defense gets no credit against it."""
    adapts: ClassVar[bool] = False
    """Whether the attack can adapt to a defense; true if a subclass has a field ``adapt``."""
    random_threat: ClassVar[bool] = False
    """Whether the threat model may be random (a patch's place), so that ``adapt.draws`` has an effect on any system."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.adapts = cls.adapts or "adapt" in inspect.get_annotations(cls)

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self,
        system: System,
        x: Tensor,
        y: Tensor,
        goal_class: Tensor | None = None,
        goal_map: Tensor | None = None,
    ) -> Attacked:
        """Attack a batch.

        Args:
            system: the deployed system.
            x: benign inputs ``[B, C, H, W]`` in ``[0, 1]``.
            y: labels ``[B]``, which should no longer be predicted. An attack that keeps the prediction ignores them and
                keeps the benign prediction.
            goal_class: ``[B]``, the class to be predicted; ``None``: any but ``y`` (untargeted).
            goal_map: ``[B, H, W]``, the target map; ``None``: :meth:`default_goal_map`, or the
                benign map of the benign prediction.

        Raises:
            InputError: bad tensors, a goal class equal to the label, or one for an attack that keeps the prediction.
            NotDifferentiableError: the attack needs the gradient of maps that have none.
            UnsupportedModelError: a second derivative that torch lacks, or a surrogate for a model whose function calls
                cannot be seen.
        """
        goal, found = self._searched(system, x, y, goal_class, goal_map)
        with torch.no_grad():
            logits = answer(system.model, found.x, finite=False)
            finite = logits.isfinite().all(1)
            if not bool(finite.all()):
                # A search may lead to such an answer, which is no success; the benign inputs may not.
                answer(system.model, x)
        success = ~hit(logits, goal.label) if self.keeps_prediction else hit(logits, goal.label, goal.goal_class)
        success &= finite
        return Attacked(found.x, success, found.zero_direction, found.stalled, found.surrogate_misled, found.queries)

    def inputs(
        self,
        system: System,
        x: Tensor,
        y: Tensor,
        goal_class: Tensor | None = None,
        goal_map: Tensor | None = None,
    ) -> Tensor:
        """The inputs ``[B, C, H, W]`` of a call with the same arguments, which are not judged: one pass less.

        For training, which uses what an attack finds whether it succeeds or not.

        Raises:
            InputError: as for a call, but for an answer that is not finite on what was found.
            NotDifferentiableError, UnsupportedModelError: as for a call.
        """
        return self._searched(system, x, y, goal_class, goal_map)[1].x

    def _searched(
        self, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None
    ) -> tuple[Goal, SearchResult]:
        """The goal of a call, and what the search finds."""
        with torch.inference_mode(False):
            x, y = usable_by_autograd(x), usable_by_autograd(y)
            goal_class, goal_map = (t if t is None else usable_by_autograd(t) for t in (goal_class, goal_map))
            return self._find(system, x, y, goal_class, goal_map)

    def _find(
        self, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None
    ) -> tuple[Goal, SearchResult]:
        system = self.looks_at(system)
        with checks.one_dtype(x, system):
            first = self._check(system, x, y, goal_class, goal_map)
        goal_map = self.default_goal_map(x) if goal_map is None else goal_map
        goal = rescaled(system, self._goal(system, x.detach(), y, goal_class, goal_map), first)
        streams = Streams.of(goal.x, self.seed, type(self).__name__)
        with torch.enable_grad(), named_derivatives():
            plan = self.plan(system)
            if not hasattr(plan, "run"):
                raise InputError(f"{type(self).__name__}.plan must give a Plan, such as a Search, got {plan!r:.80}")
            with checks.one_dtype(x, system):
                return goal, plan.run(system, goal, streams)

    @abstractmethod
    def plan(self, system: System) -> Plan:
        """The attack against ``system``: threat model, objective and search."""

    def summaries(self) -> tuple[str, str, str]:
        """Threat model, objective and search against an undefended system, in a few words each, for tables."""
        return self.plan(_plain_system()).summaries()

    @property
    def short_of(self) -> str:
        """In words, that its steps end before the border of its ball, so that a larger radius would change nothing.

        Empty where they do not, where they grow with the radius, or where that is not known before the attack.
        """
        eps = getattr(self, "eps", None)
        if not isinstance(eps, (int, float)):
            return ""
        try:
            reach, more = (replace(self, eps=radius)._reach for radius in (eps, 1.01 * eps))  # type: ignore[call-arg]
        except Exception:
            # No radius is larger, the attack is fitted first, or its plan fails, which it will say itself.
            return ""
        if reach is None or reach >= eps * (1 - 1e-6) or more != reach:
            return ""
        return f"all steps together come to {reach:.3g}, and eps is {eps:.3g}: set step_size, or more steps"

    @property
    def _reach(self) -> float | None:
        reach: float | None = getattr(self.plan(_plain_system()), "reach", None)
        return reach

    @final
    def adapted(self, system: System) -> Self:
        """The attack by an adversary who knows the defended ``system``; the same object if nothing changes.

        Where neither ``system`` nor threat model is random there is one draw, whatever ``adapt.draws`` says.
        """
        if not self.adapts:
            return self
        changes = self._changes(system)
        if "adapt" in changes and not (system.random or self.random_threat):
            # A column of a matrix meets rows in which nothing is random, the undefended one at least.
            changes["adapt"] = replace(changes["adapt"], draws=1)
        adapted = replace(self, **changes)
        return self if adapted == self else adapted

    @property
    def adaptation(self) -> str:
        """What the attack does about defenses, in a few words for tables."""
        adapt: Adaptation | None = getattr(self, "adapt", None)
        return "nothing to adapt" if adapt is None else adapt.words

    def _changes(self, system: System) -> dict[str, Any]:
        """The fields that an adversary who knows ``system`` changes; called if there is a field ``adapt``."""
        adapt: Adaptation = getattr(self, "adapt")  # noqa: B009
        return {"adapt": adapt.to(system)}

    def fitted(self, system: System, x: Tensor, y: Tensor) -> Attack:
        """The attack fitted on the adversary's images ``x`` ``[N, C, H, W]`` with labels ``y`` ``[N]``.

        Computes universal perturbations and trains substitutes; attacks that need no fit return themselves.
        """
        return self

    def informed(self, known: Known) -> Attack:
        """The attack of an adversary who knows how maps are judged; itself for those who use no such knowledge."""
        return self

    def reaching(self) -> Attack | None:
        """The attack, as one that can be given a goal map; ``None`` if there is no such form of it."""
        return self if self.needs_maps and not self.moves_map else None

    def looks_at(self, system: System) -> System:
        """The system that this attack uses: the same classifier, possibly with the maps of an aggregate's members."""
        return system

    def default_goal_map(self, x: Tensor) -> Tensor | None:
        """``[B, H, W]``: the target map of a call without one; ``None`` stands for the benign map."""
        return None

    def differentiates(self, system: System) -> bool:
        """Whether the attack on ``system`` needs the gradient of its maps."""
        return self.needs_maps

    def _goal(self, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None) -> Goal:
        label = y.to(x.device, torch.int64)
        wanted = None if goal_class is None else goal_class.to(x.device, torch.int64)
        if not (self.needs_maps or self.keeps_prediction):
            return Goal(x, label, wanted)
        with torch.no_grad():
            found = system.interpreter.explain(x, native=True) if self.needs_maps else None
            logits = answer(system.model, x) if found is None else found.logits
        benign = None if found is None else found.maps
        goal = Goal(x, label, wanted, benign_map=benign, benign_logits=logits)
        if self.keeps_prediction:
            goal = replace(goal, label=logits.argmax(1), explained=logits.argmax(1))
        if benign is None:
            return goal
        wanted_map = None if goal_map is None else system.interpreter.lay_out(goal_map.to(x), x)
        return replace(goal, goal_map=_native(wanted_map, benign))

    def _check(
        self, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None
    ) -> Tensor:
        """Refuse bad arguments; the logits of the first input."""
        checks.inputs(x)
        if checks.kind_of(x) not in self.takes:
            raise InputError(
                f"attacks on inputs move pixels in [0, 1], and {type(self).__name__} got table rows of shape "
                f"{list(x.shape)}; for tables see robustexplain.attacks.manipulation"
            )
        admit(system.model, x)
        with torch.no_grad():
            first = answer(system.model, x[:1])
        num_classes = first.shape[1]
        checks.classes(y, len(x), num_classes, "y")
        if goal_class is not None:
            if self.keeps_prediction:
                raise InputError(f"{type(self).__name__} keeps the prediction: it takes no goal_class")
            checks.classes(goal_class, len(x), num_classes, "goal_class")
            if bool((goal_class.cpu() == y.cpu()).any()):
                raise InputError("goal_class equals the label y for some samples: there is nothing to attack")
        if goal_map is not None:
            checks.maps_like(goal_map, x, "goal_map")
        if self.differentiates(system) and not system.interpreter.differentiable:
            able = ", ".join(e.name for e in INTERPRETERS if getattr(e.build, "differentiable", False))
            own = type(innermost(system.interpreter)).__name__
            raise NotDifferentiableError(
                f"{type(self).__name__} needs the gradient of the maps, and {own} has none; "
                f"interpreters that do: {able}"
            )
        return first


def rescaled(system: System, goal: Goal, first: Tensor) -> Goal:
    """The goal with a scale for each sample whose logits are tiny or huge.

    Otherwise a cross-entropy is lost to rounding, or outweighs every other term by the size of its logits. Where the
    goal has no benign logits, ``first`` ``[1, K]`` tells whether they are worth a forward pass.
    """
    logits = goal.benign_logits
    if logits is None and extreme(first):
        with torch.no_grad():
            logits = torch.cat([answer(system.model, part) for part in goal.x.split(256)])
    return goal if logits is None else replace(goal, scale=scale_of(logits))


@cache
def _plain_system() -> System:
    model = build("small-cnn", num_classes=3)
    return System(model, GradCAM(model))


def _native(goal_map: Tensor | None, benign: Tensor) -> Tensor:
    """The goal map on the grid of the ``benign`` one; ``None`` gives the benign map itself."""
    if goal_map is None or goal_map.shape == benign.shape:
        return benign if goal_map is None else goal_map.to(benign)
    # Under autocast the benign map is in half precision, in which nothing is resized.
    wanted = goal_map.to(benign.device, torch.promote_types(benign.dtype, torch.float32))[:, None]
    size = benign.shape[-2:]
    return F.interpolate(wanted, size=size, mode="bilinear", align_corners=False, antialias=True)[:, 0].to(benign)
