"""Black-box searches that move a row's explanation: random walk, hill climbing, column switch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from robustexplain import maps as ops
from robustexplain.checks import Kind
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, Fraction, Positive
from robustexplain.objectives import Goal, KeepPrediction, MatchMap, Objective
from robustexplain.random_streams import Streams, generator
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..base import Attack
from ..search.loop import Plan, SearchResult
from ..threat import Threat


@dataclass(frozen=True)
class ColumnRanges(Threat):
    """Every column within what the adversary's own rows hold: a range, or one of few values.

    Args:
        low: ``[D]``.
        high: ``[D]``.
        values: of columns of few values, by column.
    """

    low: Tensor | None = field(default=None, repr=False, compare=False)
    high: Tensor | None = field(default=None, repr=False, compare=False)
    values: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, x: Tensor, few: int) -> ColumnRanges:
        """Those of rows ``[N, D]``; of images ``[N, C, H, W]`` the whole of ``[0, 1]``."""
        rows = x.flatten(1)
        if x.dim() == 4:
            return cls(torch.zeros_like(rows[0]), torch.ones_like(rows[0]))
        distinct = {i: column.unique() for i, column in enumerate(rows.T)}
        return cls(rows.amin(0), rows.amax(0), {i: v for i, v in distinct.items() if len(v) <= few})

    @property
    def summary(self) -> str:
        """A few words for tables."""
        return "columns within their ranges"

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clip to the ranges; a row that leaves them already may stay where it is."""
        assert self.low is not None  # bound by the attack's fit; for the type checker
        assert self.high is not None
        low, high = (end.to(x).reshape(x.shape[1:]) for end in (self.low, self.high))
        return variable.clamp(torch.minimum(low, x), torch.maximum(high, x))

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """No change: the searches draw their own."""
        return x.clone()


@dataclass(frozen=True)
class _Climb(Plan):
    """Random changes of some columns; those that keep the prediction are taken, at random or where the map moves."""

    threat: ColumnRanges
    steps: int
    directions: int
    columns: int
    step_size: float
    change: float
    climbs: bool

    @property
    def aim(self) -> Objective:
        return KeepPrediction() + MatchMap()

    @property
    def summary(self) -> str:
        return "hill climbing" if self.climbs else "random walk"

    @torch.no_grad()
    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        if goal.benign_map is None or goal.benign_logits is None:
            raise InputError("a search on rows needs the benign map")
        batch, count = len(goal.x), self.directions
        now, best = goal.x.clone(), goal.x.clone()
        furthest = torch.zeros(batch, dtype=torch.float64, device=now.device)
        benign = goal.benign_logits.softmax(1)
        for _ in range(self.steps):
            tried = self._moves(goal.x, now, streams)
            seen = system.interpreter.explain(tried.flatten(0, 1), goal.label.repeat_interleave(count), native=True)
            logits = seen.logits.reshape(batch, count, -1)
            same = logits.argmax(2) == goal.label[:, None]
            moved = (logits.softmax(2) - benign[:, None]).abs().amax(2)
            apart = _apart(seen.maps.reshape(batch, count, -1), goal.benign_map.flatten(1))
            apart = torch.where(same & (moved <= self.change), apart, -1.0)
            chosen = apart.argmax(1)
            found = apart.gather(1, chosen[:, None])[:, 0]
            candidate = tried[torch.arange(batch, device=now.device), chosen]
            now = torch.where(ops.expand(found >= 0, now), candidate, now)
            better = found > furthest
            best = torch.where(ops.expand(better, best), candidate, best)
            furthest = torch.where(better, found, furthest)
        return SearchResult.of(best, self.steps * count, stalled=furthest == 0)

    def _moves(self, x: Tensor, now: Tensor, streams: Streams) -> Tensor:
        """``[B, directions, ...]``: some columns of ``now``, each moved by a share of its range, or another value."""
        batch, width = len(x), x[0].numel()
        shape = (batch, self.directions, width)
        draws = torch.empty(shape, dtype=torch.float32, device=x.device)
        order, amount = streams.uniform(draws), streams.uniform(draws, -1.0, 1.0)
        # The columns with the lowest draws are moved.
        picked = order.argsort(2).argsort(2) < min(self.columns, width)
        assert self.threat.low is not None  # bound by the attack's fit; for the type checker
        assert self.threat.high is not None
        span = (self.threat.high - self.threat.low).to(x)
        rows = now.flatten(1)[:, None].expand(shape)
        new = rows + self.step_size * span * amount.to(x)
        for column, values in self.threat.values.items():
            place = ((amount[:, :, column] + 1) / 2 * len(values)).long().clamp(max=len(values) - 1)
            new = new.index_copy(2, torch.tensor([column], device=x.device), values.to(x)[place][:, :, None])
        moved = torch.where(picked, new, rows).reshape(batch, self.directions, *x.shape[1:])
        return torch.stack([self.threat.project(x, one) for one in moved.unbind(1)], 1)


def _apart(maps: Tensor, benign: Tensor) -> Tensor:
    """1 less the cosine of maps ``[B, n, N]`` and benign ones ``[B, N]``, in float64; 0 beside an all-zero map."""
    a, b = maps.double(), benign.double()[:, None]
    sizes = a.norm(dim=2) * b.norm(dim=2)
    return torch.where(sizes > 0, 1 - (a * b).sum(2) / sizes.clamp(min=1e-300), 0.0)


@dataclass(frozen=True)
class _Fitted(Attack):
    """An attack that knows the ranges of the adversary's own rows."""

    ranges: ColumnRanges | None = field(default=None, init=False, repr=False, compare=False)

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True
    moves_map: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images", "tables")

    def differentiates(self, system: System) -> bool:
        """Never: it uses the maps' values only."""
        return False

    def _with(self, **parts: object) -> Self:
        made = type(self)(**{f.name: getattr(self, f.name) for f in fields(self) if f.init})
        for name, value in parts.items():
            object.__setattr__(made, name, value)
        return made


@ATTACKS.register("row-search", paper="Fooling_XAI (ZanderNic), 2026: random walk, greedy hill climb", needs=("data",))
@dataclass(frozen=True)
class RowSearch(_Fitted):
    """Moves the map of a row by random changes of its columns that keep the prediction; it only asks for answers.

    A walk takes every change that keeps the prediction, a climb the one of ``directions`` whose map is furthest from
    the benign one (cosine); both return the furthest map on their way. Columns of few values jump to another observed
    one. For LIME and SHAP of tables; images too, pixel by pixel, where it is weak. Departures from the published code:
    it returns the last row of a walk, checks a climb's constraint on the row before the move, and mixes three kinds of
    moves.

    Args:
        how: ``walk`` or ``climb``.
        steps: moves one after the other.
        directions: of a climb, tried at each step.
        columns: how many a move changes.
        step_size: largest move of a column, as a share of its range.
        change: by how much the class probabilities may differ, largest of any.
        few: a column with no more distinct values is one of categories.
    """

    how: Literal["walk", "climb"] = "climb"
    steps: Count = 30
    directions: Count = 30
    columns: Count = 2
    step_size: Positive = 0.1
    change: Fraction = 0.1
    few: Count = 10

    def fitted(self, system: System, x: Tensor, y: Tensor) -> RowSearch:
        """The attack that knows the columns of rows ``x``."""
        return self._with(ranges=ColumnRanges.of(x, self.few))

    def plan(self, system: System) -> Plan:
        """The search.

        Raises:
            InputError: not fitted.
        """
        if self.ranges is None:
            raise InputError("RowSearch needs the adversary's rows: call fitted(system, x, y)")
        return self._search(self.ranges)

    def summaries(self) -> tuple[str, str, str]:
        """Threat model, objective and search, fitted or not."""
        return self._search(self.ranges or ColumnRanges()).summaries()

    def _search(self, ranges: ColumnRanges) -> Plan:
        climbs = self.how == "climb"
        directions = self.directions if climbs else 1
        return _Climb(ranges, self.steps, directions, self.columns, self.step_size, self.change, climbs)


@dataclass(frozen=True)
class _Switch(Plan):
    """The chosen columns take each other's values; a row whose prediction changes stays as it is."""

    threat: ColumnRanges
    cycle: tuple[int, ...]

    @property
    def aim(self) -> Objective:
        return KeepPrediction() + MatchMap()

    @property
    def summary(self) -> str:
        return "one switch, the same for all"

    @torch.no_grad()
    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        switched = switch(goal.x, self.cycle)
        kept = answer(system.model, switched).argmax(1) == goal.label
        return SearchResult.of(torch.where(ops.expand(kept, switched), switched, goal.x), 1, stalled=~kept)


def switch(x: Tensor, cycle: tuple[int, ...]) -> Tensor:
    """``x`` in which each column of ``cycle`` has the value of the one before it there."""
    rows = x.flatten(1).clone()
    places = list(cycle)
    rows[:, places] = x.flatten(1)[:, places[-1:] + places[:-1]]
    return rows.reshape(x.shape)


@ATTACKS.register("column-switch", paper="Fooling_XAI (ZanderNic), 2026: column switch", needs=("data",))
@dataclass(frozen=True)
class ColumnSwitch(_Fitted):
    """Gives some columns each other's values, the same ones in every row: those that change the answers least.

    Explanations follow the columns' values, answers hardly do. The columns are chosen on the adversary's rows, among
    all cycles or ``tries`` random ones. A row whose prediction changes is left as it is. Values may leave their
    column's range: a check of ranges sees it.

    Args:
        columns: how many take part.
        tries: cycles that are compared.
    """

    columns: Count = 2
    tries: Count = 500

    cycle: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns < 2:
            raise FieldError(type(self).__name__, "columns", f"must be at least 2, got {self.columns}")

    @torch.no_grad()
    def fitted(self, system: System, x: Tensor, y: Tensor) -> ColumnSwitch:
        """The attack with the cycle that changes the answers to rows ``x`` least.

        Raises:
            InputError: fewer columns than are switched.
        """
        width = x[0].numel()
        if width < self.columns:
            raise InputError(f"ColumnSwitch switches {self.columns} columns, and a row has {width}")
        before = answer(system.model, x).softmax(1)
        changes = {
            cycle: float((answer(system.model, switch(x, cycle)).softmax(1) - before).abs().sum(1).mean())
            for cycle in self._cycles(width)
        }
        best = min(changes, key=lambda cycle: (changes[cycle], cycle))
        return self._with(ranges=ColumnRanges.of(x, 1), cycle=best)

    def plan(self, system: System) -> Plan:
        """The switch.

        Raises:
            InputError: not fitted.
        """
        if self.ranges is None:
            raise InputError("ColumnSwitch needs the adversary's rows: call fitted(system, x, y)")
        return _Switch(self.ranges, self.cycle)

    def summaries(self) -> tuple[str, str, str]:
        """Threat model, objective and search, fitted or not."""
        return _Switch(ColumnRanges(), ()).summaries()

    def _cycles(self, width: int) -> list[tuple[int, ...]]:
        # A cycle is the same wherever it begins: it begins with its smallest column.
        every = (c for c in itertools.permutations(range(width), self.columns) if c[0] == min(c))
        some = list(itertools.islice(every, self.tries + 1))
        if len(some) <= self.tries:
            return some
        draws = generator(self.seed, "column switch")
        return [tuple(torch.randperm(width, generator=draws)[: self.columns].tolist()) for _ in range(self.tries)]
