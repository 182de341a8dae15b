"""Attacks on explanations that are the result of an optimisation: MASK (Zhang et al. 2020, section 3.5)."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.autograd.rectifiers import Smooth
from robustexplain.door import answer
from robustexplain.errors import InputError
from robustexplain.fields import Count, Natural, NonNegative, Positive, check_fields
from robustexplain.hidden import refuse_hidden
from robustexplain.interpreters import IterativeInterpreter, MaskState
from robustexplain.objectives import Goal, Objective, Observation, Sum, needs_of
from robustexplain.random_streams import Streams
from robustexplain.rounding import wide
from robustexplain.system import System
from robustexplain.training import frozen

from ..threat import Threat
from .best import BestIterates, SearchRecord
from .directions import BetaSchedule, GradientDirection, StepContext, as_surrogate
from .loop import Plan, Search, SearchResult, Stage
from .updates import NormalisedStep


@dataclass(frozen=True)
class Bilevel:
    """Settings of Algorithm 1 of Zhang et al. 2020 against MASK; numbers are those of Table 11, or of the code.

    Departure: the authors update the mask by four steps without a graph and then take four single differentiable steps
    (``follow=4, ahead=4, unroll=False``). One graph through all eight steps gets closer to the goal map, for the same
    number of mask steps.

    Args:
        follow: steps of the mask's own optimiser after each new input, without a graph.
        ahead: differentiable steps after these; the maps of all of them are compared with the goal (``n_step``).
        unroll: differentiate through all the steps ahead. Otherwise, as in the code, the mask is detached after each
            step, and the gradient goes through single steps and through Adam's moments, which stay in the graph.
        reset: outer steps between two full optimisations of the mask, at which iterates are evaluated (``n_reset``). On
            photographs the optimised mask changes much from one to the next and the best counts: a small number gets
            closer, but each reset costs a full run of MASK.
        push: L2 length of the step on the prediction (0.05 in the code).
        reach: largest L2 length of the step on the map (``alpha_max``).
        bisections: of that length (``n_bs``; 10 in the code).
        from_start: take the steps ahead from MASK's initial mask, not from the current one (ours). They are then the
            first steps of MASK itself. Adam's first steps have the same length for any gradient, so they largely decide
            the final mask; and the current mask is already past the point at which MASK stops. Where the goal is the
            benign map, each step ahead is compared with the map of the same step of MASK's run on the benign input.
            Measured: closer to the benign map where MASK stops before it converges (photographs), less close where it
            converges (32 pixels); closer to random patches on CIFAR-10's ResNet-20 with ``ahead=16``, less close on a
            small network for digits.
    """

    follow: Natural = 0
    ahead: Count = 8
    unroll: bool = True
    reset: Count = 50
    push: NonNegative = 0.05
    reach: Positive = 0.08
    bisections: Natural = 12
    from_start: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class BilevelSearch(Plan):
    """Algorithm 1 of Zhang et al. 2020 with section 3.6: bilevel optimisation of the input and its mask.

    Each outer step (i) steps on the prediction, (ii) updates the mask by ``settings.follow`` steps of its own Adam,
    (iii) takes ``settings.ahead`` differentiable mask steps, and (iv) steps on the map, against the gradient of the
    mean map loss over the steps of (iii). The length of (iv) is the largest that keeps the constraints of
    ``prediction`` met, found by bisection for each sample. The mask and its Adam state carry over between outer steps.
    Every ``settings.reset`` steps both are replaced by those of a full run of MASK on the current input. Iterates are
    evaluated there and at the end, by MASK's own map. Any interpreter that is ``iterative`` can be attacked this way.

    Departures from the authors' code: the length of (iv) is separate for each sample (theirs is one for the whole
    batch, because the margin is summed over it); (i) uses the paper's cross-entropy and not the logit margin, and the
    bisection requires the confidence of ``prediction`` and not a margin of 10; the warm start ends for each sample when
    that confidence is reached (at far higher confidence MASK's gradient vanishes: the mask is empty, and so is the
    gradient through it); the mask starts as ``g(x; f)``, as in Algorithm 1, and not at 0.5; at a reset Adam's moments
    are those at the end of MASK's own run and its counter is ``interpreter.steps`` (theirs are a half and a quarter of
    the old moments, and a counter of 100); the largest step does not shrink after 900 steps; nothing is rounded to 8
    bits; with ``settings.from_start``, (ii) is left out and (iii) starts from MASK's initial mask.

    Args:
        threat: the set of allowed inputs.
        warm: a first stage on the prediction alone; its steps are the most that it takes.
        prediction: objective of (i), whose constraints (iv) must keep met.
        match: objective of (iv), on the maps of the steps ahead.
        steps: outer steps.
        settings: of the algorithm.
        surrogate: replaces the rectifiers while the gradient through the mask is computed.
        straight: straight-through gradients for rounding.
        restarts: number of runs, of which the best counts; every run but the first begins at random.
    """

    threat: Threat
    warm: Stage
    prediction: Objective
    match: Objective
    steps: Natural
    settings: Bilevel = field(default_factory=Bilevel)
    surrogate: Smooth | BetaSchedule | None = None
    straight: bool = False
    restarts: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def aim(self) -> Objective:
        """The prediction's constraints, then the map."""
        return Sum(self.prediction.terms() + self.match.terms())

    @property
    def summary(self) -> str:
        """A few words for tables."""
        return "bilevel: look ahead, bisect the step"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Search from ``goal.x``; samples do not influence each other.

        Raises:
            InputError: the system's interpreter is not iterative, or its gradient is not finite.
        """
        if not isinstance(system.interpreter, IterativeInterpreter):
            name = type(system.interpreter).__name__
            raise InputError(f"a bilevel search is for Mask and other iterative interpreters, got {name}")
        best, record = BestIterates.none(goal.x), SearchRecord.none(goal.x)
        with frozen(system.model):
            for attempt in range(self.restarts):
                direction = GradientDirection(straight=self.straight)
                warm = Search(self.threat, (self.warm,), direction, random_start=attempt > 0, early_stop=True)
                begun = warm.run(system, goal, streams)
                record.queries += begun.queries
                _Run(self, system, system.interpreter, goal, streams, begun.x, best, record).every_step()
        return SearchResult.judged(best, record)


@dataclass
class _Run:
    """The state of one run of the search."""

    plan: BilevelSearch
    system: System
    mask: IterativeInterpreter
    goal: Goal
    streams: Streams
    x: Tensor
    best: BestIterates
    record: SearchRecord
    goals_ahead: tuple[Goal, ...] = field(init=False)
    """The goal for the map after each step ahead."""
    classes: Tensor = field(init=False)
    """``[B]``: the class that is explained at the current input."""

    def __post_init__(self) -> None:
        # Computed here, with the real model: during the steps ahead a surrogate replaces it, which has other masks.
        self.goals_ahead = self._goals_ahead()

    def every_step(self) -> None:
        """Every outer step of Algorithm 1, with a reset before the first one and an evaluation after the last."""
        for step in range(self.plan.steps):
            progress = step / self.plan.steps
            if step % self.plan.settings.reset == 0:
                state = self._reset(progress)
            self.x = self._step_on_prediction(progress)
            state = self._follow_mask(state)
            gradient, state = self._look_ahead(state, progress)
            if step == 0:
                self.record.zero_direction |= (gradient.flatten(1) == 0).all(1)
            self.x = self._step_on_map(gradient, progress)
        self._reset(1.0)

    def _goals_ahead(self) -> tuple[Goal, ...]:
        """The goal for each step ahead: with ``from_start`` and a benign goal map, MASK's benign map at that step."""
        goal, ahead = self.goal, self.plan.settings.ahead
        if not self.plan.settings.from_start or goal.goal_map is None or goal.benign_map is None:
            return (goal,) * ahead
        goal_map = goal.goal_map
        rows = (goal_map == goal.benign_map).flatten(1).all(1).nonzero()[:, 0]
        if not len(rows):
            return (goal,) * ahead
        self.record.queries[rows] += 1 + ahead
        return tuple(
            replace(goal, goal_map=goal_map.index_copy(0, rows, maps)) for maps in self._first_maps(goal.x[rows])
        )

    @torch.no_grad()
    def _first_maps(self, x: Tensor) -> list[Tensor]:
        """The maps of the first ``settings.ahead`` steps of MASK on ``x``."""
        classes, background = answer(self.system.model, x).argmax(1), self.mask.background(x)
        state, streams, maps = self.mask.begin(x), Streams.of(x, self.mask.seed, "mask"), []
        for _ in range(self.plan.settings.ahead):
            state = self.mask.step(x, background, state, classes, self.mask.shifts(x, streams))
            maps.append(self._map(state))
        return maps

    def _explained(self, logits: Tensor) -> Tensor:
        return logits.argmax(1) if self.goal.target is None else self.goal.target

    def _context(self, progress: float) -> StepContext:
        return StepContext(self.system, self.plan.threat, self.goal, self.plan.prediction, self.streams, progress)

    @torch.no_grad()
    def _reset(self, progress: float) -> MaskState:
        """A full run of MASK on the current input, which is evaluated by the result."""
        seen = self._context(progress).observe(self.x)
        state = self.mask.optimise(self.x, self._explained(seen.logits))
        # MASK may stop some samples earlier and does not report which: this is an upper bound.
        self.record.queries += 1 + self.mask.steps
        self.best.update(slice(None), replace(seen, maps=self._map(state)), self.goal, self.plan.aim)
        return state._replace(step=self.mask.steps)

    def _map(self, state: MaskState) -> Tensor:
        return self.mask.map_of(state).to(self.x.dtype)

    def _step_on_prediction(self, progress: float) -> Tensor:
        """(i): the input after the step on the prediction."""
        size = self.plan.settings.push
        if size == 0:
            return self.x
        x = self.x.detach().requires_grad_()
        with torch.enable_grad(), self._surrogate(progress, needs_of(self.plan.prediction)):
            context = self._context(progress)
            loss = context.loss(context.observe(x))
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        self.record.queries += 1
        moved, _ = NormalisedStep(size)(self.x, gradient, progress, ())
        return self.plan.threat.project(self.goal.x, moved)

    def _follow_mask(self, state: MaskState) -> MaskState:
        """(ii): the mask after ``follow`` steps on the current input; sets the explained class."""
        with torch.no_grad():
            self.classes = self._explained(answer(self.system.model, self.x))
            background = self.mask.background(self.x)
        steps = 0 if self.plan.settings.from_start else self.plan.settings.follow
        for _ in range(steps):
            state = self.mask.step(self.x, background, state, self.classes, self.mask.shifts(self.x, self.streams))
        self.record.queries += 1 + steps
        return state

    def _look_ahead(self, state: MaskState, progress: float) -> tuple[Tensor, MaskState]:
        """(iii): the gradient of the mean map loss over the steps ahead, and the mask state after them."""
        x = self.x.detach().requires_grad_()
        total, state = x.new_zeros(len(x)), self.mask.begin(x) if self.plan.settings.from_start else state
        with torch.enable_grad(), self._surrogate(progress):
            background = self.mask.background(x)
            for goal in self.goals_ahead:
                shift = self.mask.shifts(x, self.streams)
                state = self.mask.step(x, background, state, self.classes, shift, graph=True)
                seen = Observation(x, x.new_zeros(len(x), 1), self._map(state), variable=x)
                total = total + self.plan.match.loss(seen, goal)
                if not self.plan.settings.unroll:
                    state = state._replace(mask=state.mask.detach())
            (gradient,) = torch.autograd.grad(total.sum() / self.plan.settings.ahead, x)
        self.record.queries += self.plan.settings.ahead
        if not bool(torch.isfinite(gradient).all()):
            raise InputError("the gradient through the mask is NaN or infinite: does the model overflow on this input?")
        return gradient, MaskState(state.mask.detach(), state.first.detach(), state.second.detach(), state.step)

    @torch.no_grad()
    def _step_on_map(self, gradient: Tensor, progress: float) -> Tensor:
        """(iv): the input after the longest step against ``gradient`` that keeps the constraints, for each sample."""
        gradient = wide(gradient)
        norm = ops.expand(gradient.flatten(1).norm(dim=1), gradient)
        along = gradient / norm.clamp(min=1e-12)

        def moved(length: Tensor, rows: Tensor) -> Tensor:
            return self.plan.threat.project(self.goal.x[rows], self.x[rows] - ops.expand(length, along) * along[rows])

        everyone = torch.arange(len(along), device=along.device)
        longest = along.new_full((len(along),), self.plan.settings.reach)
        length = torch.where(self._kept(moved(longest, everyone), everyone, progress), longest, 0)
        rows = (length == 0).nonzero()[:, 0]
        low, high = length[rows], longest[rows]
        for _ in range(self.plan.settings.bisections if len(rows) else 0):
            middle = (low + high) / 2
            kept = self._kept(moved(middle, rows), rows, progress)
            low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
        length[rows] = low
        # A length of zero leaves the input unchanged bit for bit: x - 0 is x.
        return moved(length, everyone)

    def _kept(self, x: Tensor, rows: Tensor, progress: float) -> Tensor:
        """``[rows]`` bool: where the constraints on the prediction are met."""
        goal, streams = self.goal.select(rows), self.streams.select(rows)
        context = replace(self._context(progress), goal=goal, streams=streams)
        self.record.queries[rows] += 1
        return self.plan.prediction.met(context.observe(x), goal)

    def _surrogate(self, progress: float, needs: Collection[str] = ("maps",)) -> AbstractContextManager[None]:
        if (self.plan.surrogate is not None and needs) or self.plan.straight:
            refuse_hidden(self.system.model, "a surrogate replaces function calls of the model")
        return as_surrogate(self.plan.surrogate if needs else None, self.plan.straight, progress)
