"""Attacks on explanations that are themselves the end of an optimisation: MASK (Zhang et al. 2020, section 3.5)."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.autograd.rectifiers import Smooth
from robustexplain.errors import InputError
from robustexplain.fields import Count, Natural, NonNegative, Positive, check_fields
from robustexplain.interpreters import IterativeInterpreter, MaskState
from robustexplain.objectives import Goal, Objective, Observation, Sum, needs_of
from robustexplain.random_streams import Streams
from robustexplain.system import System
from robustexplain.training import frozen

from ..threat import Threat
from .best import BestIterates, SearchRecord
from .directions import BetaSchedule, StepContext, followed
from .loop import Plan, Search, SearchResult, Stage
from .updates import NormalisedStep


@dataclass(frozen=True)
class Bilevel:
    """How Algorithm 1 of Zhang et al. 2020 is run against MASK; numbers are those of Table 11, or of the code.

    Departure: the authors let the mask follow by four steps and look four single steps ahead (``follow=4, ahead=4,
    unroll=False``); one graph through all eight leads nearer, for the same number of steps of the mask.

    Args:
        follow: steps of the mask's own optimiser that follow each new input, without a graph.
        ahead: differentiable steps after them; the maps of all of them are compared with the goal (``n_step``).
        unroll: differentiate through all the steps ahead. Otherwise, as in the code, the mask is cut from the graph
            after each, and the gradient goes through single steps and through Adam's moments, which stay in it.
        reset: outer steps between two masks that are optimised anew, and judged (``n_reset``). A photograph's mask
            jumps from one to the next, and the best counts: a small number leads nearer, at MASK's full cost each.
        push: L2 length of the step on the prediction (0.05 in the code).
        reach: largest L2 length of the step on the map (``alpha_max``).
        bisections: of that length (``n_bs``; 10 in the code).
        rehearse: look ahead from MASK's first value and not from the mask that follows (ours): the steps ahead are then
            the first steps of MASK itself. Adam's first steps have one length whatever the slope, so they decide where
            a mask ends; and a mask that follows goes on where MASK has stopped. Where the benign map is the goal, each
            step ahead is compared with what MASK's run on the benign input shows at the same step. It leads nearer to
            the benign map where MASK's steps end before it rests (photographs), and less near where it rests (32
            pixels); nearer to random patches on CIFAR-10's ResNet-20, with ``ahead=16``, and less near on a small
            network for digits.
    """

    follow: Natural = 0
    ahead: Count = 8
    unroll: bool = True
    reset: Count = 50
    push: NonNegative = 0.05
    reach: Positive = 0.08
    bisections: Natural = 12
    rehearse: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class BilevelSearch(Plan):
    """Algorithm 1 of Zhang et al. 2020 with section 3.6: an input that is led, and a mask that follows it.

    Each outer step (i) steps on the prediction, (ii) lets the mask follow by ``settings.follow`` steps of its own Adam,
    (iii) looks ``settings.ahead`` differentiable steps ahead, and (iv) steps on the map: against the gradient of the
    mean map loss over these, as far as the constraints of ``prediction`` stay met: each sample's own length, by
    bisection. The mask and its Adam go on from step to step; every ``settings.reset`` steps both are replaced by those
    of the optimisation that MASK itself runs on the present input. Iterates are evaluated there and at the end, by
    MASK's own map. Any interpreter that is ``iterative`` can be attacked so.

    Departures from the authors' code: the length is each sample's own (theirs is one for the whole batch, because the
    margin is summed over it); the step on the prediction follows the paper's cross-entropy and not the logit margin,
    and the bisection asks for the confidence of ``prediction`` and not for a margin of 10; the warm start ends for each
    sample where that is met (on a prediction that is surer by far MASK sees no slope: the mask is empty, and so is the
    gradient through it); the mask starts as ``g(x; f)``, as in Algorithm 1, and not at 0.5; at a reset Adam's moments
    are those of MASK's own run, which stand at the new mask, and its counter is ``interpreter.steps`` (theirs halve and
    quarter the old ones and count from 100); the longest step does not shrink after 900 steps; nothing is rounded to 8
    bits; with ``settings.rehearse``, (ii) is left out and (iii) starts where MASK itself starts.

    Args:
        threat: where the input may go.
        warm: a first stage on the prediction alone, at most so long.
        prediction: what the first half of a step minimises, and what the second half must keep met.
        match: what the second half minimises, of the maps ahead.
        steps: outer steps.
        settings: of the algorithm.
        surrogate: what rectifiers compute while the gradient through the mask is sought.
        straight: go straight through rounding.
        restarts: run this often and keep the best; every run but the first begins at random.
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
        """Bilevel."""
        return "bilevel: look ahead, bisect the step"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        """Search from ``goal.x``; every sample on its own.

        Raises:
            InputError: the system's interpreter is not iterative, or its gradient is not finite.
        """
        if not isinstance(system.interpreter, IterativeInterpreter):
            name = type(system.interpreter).__name__
            raise InputError(f"a bilevel search is for Mask and other iterative interpreters, got {name}")
        best, record = BestIterates.none(goal.x), SearchRecord.none(goal.x)
        with frozen(system.model):
            for attempt in range(self.restarts):
                warm = Search(self.threat, (self.warm,), random_start=attempt > 0, early_stop=True)
                begun = warm.run(system, goal, streams)
                record.queries += begun.queries
                _Run(self, system, system.interpreter, goal, streams, begun.x, best, record).every_step()
        return SearchResult.judged(best, record)


@dataclass
class _Run:
    """One run of the search: the input, the mask that follows it, and what was found on the way."""

    plan: BilevelSearch
    system: System
    mask: IterativeInterpreter
    goal: Goal
    streams: Streams
    x: Tensor
    best: BestIterates
    record: SearchRecord
    goals_ahead: tuple[Goal, ...] = field(init=False)
    """What the map is compared with after each step ahead."""
    classes: Tensor = field(init=False)
    """``[B]``: the class that is explained at the present input."""

    def __post_init__(self) -> None:
        # These maps are the real model's. During a look ahead a stand-in takes its place, and its masks are others.
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
        """The goal, for every step; if these start with MASK and the goal is the benign map, MASK's own way to it."""
        goal, ahead = self.goal, self.plan.settings.ahead
        if not self.plan.settings.rehearse or goal.goal_map is None or goal.benign_map is None:
            return (goal,) * ahead
        goal_map = goal.goal_map
        rows = (goal_map == goal.benign_map).flatten(1).all(1).nonzero()[:, 0]
        if not len(rows):
            return (goal,) * ahead
        self.record.queries[rows] += 1 + ahead
        return tuple(replace(goal, goal_map=goal_map.index_copy(0, rows, maps)) for maps in self._first(goal.x[rows]))

    @torch.no_grad()
    def _first(self, x: Tensor) -> list[Tensor]:
        """The maps of the first ``settings.ahead`` steps of MASK on ``x``."""
        classes, background = self.system.model(x).argmax(1), self.mask.background(x)
        state, streams, shown = self.mask.begin(x), Streams.of(x, self.mask.seed, "mask"), []
        for _ in range(self.plan.settings.ahead):
            state = self.mask.step(x, background, state, classes, self.mask.shifts(x, streams))
            shown.append(self._map(state))
        return shown

    def _explained(self, logits: Tensor) -> Tensor:
        return logits.argmax(1) if self.goal.target is None else self.goal.target

    def _context(self, progress: float) -> StepContext:
        return StepContext(self.system, self.plan.threat, self.goal, self.plan.prediction, self.streams, progress)

    @torch.no_grad()
    def _reset(self, progress: float) -> MaskState:
        """MASK's own mask of the present input, by which the input is evaluated."""
        seen = self._context(progress).observe(self.x)
        state = self.mask.optimise(self.x, self._explained(seen.logits))
        # MASK stops some samples earlier, and does not say which: this is the most that it shows.
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
        with torch.enable_grad(), self._followed(progress, needs_of(self.plan.prediction)):
            context = self._context(progress)
            loss = context.loss(context.observe(x))
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        self.record.queries += 1
        moved, _ = NormalisedStep(size)(self.x, gradient, progress, ())
        return self.plan.threat.project(self.goal.x, moved)

    def _follow_mask(self, state: MaskState) -> MaskState:
        """(ii): the mask after its steps on the present input, and the class that it explains there."""
        with torch.no_grad():
            self.classes = self._explained(self.system.model(self.x))
            background = self.mask.background(self.x)
        steps = 0 if self.plan.settings.rehearse else self.plan.settings.follow
        for _ in range(steps):
            state = self.mask.step(self.x, background, state, self.classes, self.mask.shifts(self.x, self.streams))
        self.record.queries += 1 + steps
        return state

    def _look_ahead(self, state: MaskState, progress: float) -> tuple[Tensor, MaskState]:
        """(iii): the gradient of the mean map loss over the steps ahead, and where they end."""
        x = self.x.detach().requires_grad_()
        total, state = x.new_zeros(len(x)), self.mask.begin(x) if self.plan.settings.rehearse else state
        with torch.enable_grad(), self._followed(progress):
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
        """(iv): the input after the longest step against ``gradient`` that keeps the prediction, for each sample."""
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
        # Where nothing moves the input stays the same bits: x - 0 is x.
        return moved(length, everyone)

    def _kept(self, x: Tensor, rows: Tensor, progress: float) -> Tensor:
        """``[rows]`` bool: where the constraints on the prediction are met."""
        goal, streams = self.goal.select(rows), self.streams.select(rows)
        context = replace(self._context(progress), goal=goal, streams=streams)
        self.record.queries[rows] += 1
        return self.plan.prediction.met(context.observe(x), goal)

    def _followed(self, progress: float, needs: Collection[str] = ("maps",)) -> AbstractContextManager[None]:
        return followed(self.plan.surrogate if needs else None, self.plan.straight, progress)
