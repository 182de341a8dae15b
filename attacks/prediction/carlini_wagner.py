"""Carlini and Wagner's attack (CW), and what attacks with minimum norm share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.fields import Count, NonNegative, Positive
from robustexplain.objectives import Distance, Goal, Margin, Objective, Traded, needs_of
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.rounding import wide
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..search.directions import observe
from ..search.loop import Plan, Search, SearchResult, Stage
from ..search.updates import Adam
from ..threat import Threat

_NEARLY = 0.999999
_LARGEST_CONSTANT = 1e10


@dataclass(frozen=True)
class Box(Threat):
    """Any image in ``[0, 1]``; the variable is the image. The size of the change is left to the objective."""

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clip to ``[0, 1]``."""
        return variable.clamp(0, 1).to(x.dtype)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Uniform noise."""
        return streams.uniform(x)


@dataclass(frozen=True)
class TanhBox(Threat):
    """Any image in ``[0, 1]``, as ``(tanh(w) + 1) / 2`` (Carlini and Wagner 2017, section V-B).

    The start is ``w = artanh(0.999999 (2 x - 1))``, as in their code: without the factor, pixels of 0 and 1 would be
    infinite. The variable is float32 at least: in half precision 0.999999 is 1.
    """

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """The variable of ``x``, or of a random image."""
        return self._inverse(x if streams is None else self.sample(x, streams))

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """``(tanh(w) + 1) / 2``."""
        return ((variable.tanh() + 1) / 2).to(x.dtype)

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """The variable itself: all are allowed."""
        return variable

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Uniform noise, as an image."""
        return streams.uniform(x)

    @staticmethod
    def _inverse(image: Tensor) -> Tensor:
        return (_NEARLY * (2 * wide(image) - 1)).atanh()


@dataclass
class Constants:
    """For each sample, the search for the smallest constant that succeeds: times ten, then bisection.

    Args:
        now: ``[B]``, the constants to try.
        low: the largest that failed.
        high: the smallest that succeeded; infinite before there is one.
    """

    now: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def first(cls, x: Tensor, initial: float) -> Constants:
        """Before the first trial."""
        now = wide(x.new_empty(len(x))).fill_(initial)
        return cls(now, torch.zeros_like(now), torch.full_like(now, torch.inf))

    def tried(self, success: Tensor) -> None:
        """Update the bounds by whether ``now`` succeeded, ``[B]`` bool, and choose the next constants."""
        self.high = torch.where(success, torch.minimum(self.high, self.now), self.high)
        self.low = torch.where(success, self.low, torch.maximum(self.low, self.now))
        self.now = torch.where(self.high.isinf(), self.now * 10, (self.low + self.high) / 2).clamp(
            max=_LARGEST_CONSTANT
        )


@dataclass
class Nearest:
    """For each sample, the nearest successful image so far; before there is one, the benign image."""

    x: Tensor
    distance: Tensor

    @classmethod
    def none(cls, x: Tensor) -> Nearest:
        """Before the first success."""
        return cls(x.clone(), wide(x.new_empty(len(x))).fill_(torch.inf))

    @property
    def found(self) -> Tensor:
        """``[B]`` bool: where there is a successful image."""
        return ~self.distance.isinf()

    def update(self, benign: Tensor, x: Tensor, success: Tensor) -> None:
        """Keep ``x`` where it succeeds and is nearer to ``benign`` in L2."""
        distance = (wide(x) - wide(benign)).flatten(1).norm(dim=1)
        better = success & (distance < self.distance)
        self.distance = torch.where(better, distance, self.distance)
        self.x = torch.where(ops.expand(better, x), x, self.x)


@dataclass(frozen=True)
class _ConstantSearch(Plan):
    """One search per round for all samples together, each with its own constant."""

    search: Search
    deceives: Objective
    """Constraints of a successful image: the margin (and no alarm of a detector)."""
    initial: float
    rounds: int

    @property
    def threat(self) -> Threat:  # type: ignore[override]
        return self.search.threat

    @property
    def aim(self) -> Objective:
        return Distance() + self.deceives

    @property
    def summary(self) -> str:
        return f"{self.search.summary}, {self.rounds} constants"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        constants, nearest = Constants.first(goal.x, self.initial), Nearest.none(goal.x)
        queries = torch.zeros_like(goal.label)
        for number in range(self.rounds):
            if number == self.rounds - 1 and self.rounds >= 10:
                # As in the code, the last of ten or more rounds repeats the smallest constant that succeeded.
                constants.now = torch.where(constants.high.isinf(), constants.now, constants.high)
            found = self.search.run(system, replace(goal, trade=constants.now), streams)
            success = met(self.deceives, system, goal, found.x)
            queries += found.queries + 1
            nearest.update(goal.x, found.x, success)
            constants.tried(success)
        return SearchResult.of(nearest.x, queries, ~nearest.found)


@torch.no_grad()
def met(objective: Objective, system: System, goal: Goal, x: Tensor) -> Tensor:
    """``[B]`` bool: where ``x`` meets every constraint of ``objective`` on the real system."""
    seen = observe(system, x, goal, needs_of(objective))
    return objective.met(seen, goal) & seen.logits.isfinite().all(1)


@ATTACKS.register("cw", paper="Carlini and Wagner 2017, sections V and VI-A (L2)", needs=("gradients",))
@dataclass(frozen=True)
class CW(Attack):
    """The nearest image in L2 that is predicted as wanted: ``||x' - x||^2 + c max(rival - wanted, -kappa)`` by Adam.

    ``x' = (tanh(w) + 1) / 2``; the constant ``c`` is searched for each sample: times ten until it succeeds, then
    bisected. Departures from the authors' code: early aborts are decided by each sample's own loss, where the code uses
    the sum over the batch, so that no result depends on other samples; distances are to ``x`` itself, not to its image
    under the change of variable (5e-7 off). A sample for which no constant succeeds is returned unchanged and reported
    as stalled.

    Args:
        kappa: margin by which the wanted class should lead, in logits.
        steps: of Adam, for each constant.
        step_size: Adam's learning rate, in units of ``w``.
        search_steps: number of constants tried.
        initial_constant: the first constant.
        abort_early: stop a sample if a tenth of the steps lowered its loss by less than 0.01 percent.
        adapt: to a defense.
    """

    kappa: NonNegative = 0.0
    steps: Count = 1000
    step_size: Positive = 0.01
    search_steps: Count = 9
    initial_constant: Positive = 1e-3
    abort_early: bool = True
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """Adam for each constant."""
        no_alarm = self.adapt.evasion(system)
        stage = Stage(Distance() + Traded(Margin(self.kappa)) + no_alarm, self.steps, Adam(self.step_size))
        patience = 1e-4 if self.abort_early else 0.0
        search = Search(TanhBox(), (stage,), self.adapt.direction(), patience=patience)
        return _ConstantSearch(search, Margin(self.kappa) + no_alarm, self.initial_constant, self.search_steps)
