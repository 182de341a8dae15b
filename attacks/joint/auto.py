"""The standard attacker: a fixed ensemble, tried in turn on the samples that still hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.door import answer
from robustexplain.errors import NotDifferentiableError, UnsupportedModelError
from robustexplain.hidden import hidden
from robustexplain.metrics import hit
from robustexplain.random_streams import derive
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack, Attacked
from ..explanation.attaxai import Evolution
from ..explanation.dombrowski import Dombrowski
from ..explanation.ghorbani import GhorbaniCenter, GhorbaniRandom, GhorbaniTopK
from ..goals import random_patch_maps
from ..known import NOTHING, Known
from ..prediction.gradient import PGD
from ..prediction.score_based import SPSA
from ..search.loop import Plan
from .adv2 import ADV2
from .aimed import Aimed
from .map_pgd import MapPGD

AUTO_VERSION: Literal["3"] = "3"
"""Of the ensemble: it changes with any member, setting or order, and is part of a result's identity."""

STEPS = 100
"""Of most members."""
JUDGES = 3
"""Draws under which an input must hold, of a system that draws."""
_PREDICTION = "pgd on the prediction alone"
_LONG = "map-pgd from a random start, twice the steps"


class Member(NamedTuple):
    """An attack of the ensemble.

    Args:
        name: for reports.
        attack: not adapted yet.
        transfer: run on the undefended system instead of on the attacked one.
    """

    name: str
    attack: Attack
    transfer: bool = False


@ATTACKS.register(
    "auto",
    paper="an ensemble after Croce and Hein 2020 (AutoAttack), for maps",
    needs=("gradients", "differentiable maps"),
)
@dataclass(frozen=True)
class Auto(Aimed):
    """A fixed ensemble without settings of its own: each member attacks the samples that still hold.

    It adapts every member to the system that it is given. A sample falls where the prediction is as wanted, no alarm
    rings, and the map is within the limit that :meth:`informed` tells (``move``: beyond it); without a limit all
    members attack all samples. Returned is, for each sample, the input of the member that got farthest: predicted as
    wanted, without an alarm, with the nearest map (``move``: the farthest).

    ADV2's spatial form is left out: its inputs are not in the ball. Where the maps have no gradient, the members that
    need one are left out.

    Args:
        version: of the ensemble; a recipe that names another one is refused.
        known: how maps are judged; the runner tells it.
    """

    version: Literal["3"] = AUTO_VERSION
    known: Known = field(default=NOTHING, kw_only=True, repr=False, compare=False, metadata={"recipe": False})

    adapts: ClassVar[bool] = True
    knows_defense: ClassVar[bool] = True

    def _changes(self, system: System) -> dict[str, Any]:
        """Nothing: it adapts when it attacks."""
        return {}

    @property
    def adaptation(self) -> str:
        """It adapts to whatever system it attacks."""
        return "every member adapts"

    def informed(self, known: Known) -> Auto:
        """The attack of an adversary who knows how maps are judged."""
        return replace(self, known=known)

    def default_goal_map(self, x: Tensor) -> Tensor | None:
        """A random patch, where a map must be reached."""
        return random_patch_maps(x, self.seed) if self.aim == "match" else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all members that this aim has, to which ``member`` of a result points."""
        return (*(member.name for member in self._ensemble()), _PREDICTION)

    def members(self, system: System) -> tuple[Member, ...]:
        """The ensemble against ``system``, in order."""
        # Rounding that nobody declared is passed too, where the model's calls can be seen.
        found = self._ensemble(straight=hidden(system.model) is None)
        able = tuple(member for member in found if self._can(member, system))
        if system.interpreter.differentiable or self.keeps_prediction:
            return able
        return (Member(_PREDICTION, PGD(self.eps, steps=STEPS, seed=self.seed)), *able)

    def _can(self, member: Member, system: System) -> bool:
        """Whether the system that a member attacks, which is another one in a transfer, has the maps that it needs."""
        target = self.known.root if member.transfer else system
        return target is not None and (target.interpreter.differentiable or not member.attack.differentiates(target))

    def _ensemble(self, straight: bool = False) -> tuple[Member, ...]:
        """All members of this aim; with ``straight`` one of them takes rounding for the identity."""
        found = {"forge": self._forging, "match": self._matching, "move": self._moving}[self.aim]()
        long = found[1].attack
        assert isinstance(long, MapPGD)
        changed = found[1]._replace(attack=replace(long, adapt=Adaptation(straight=straight)))
        return found[0], changed, *found[2:]

    def plan(self, system: System) -> Plan:
        """The first member's."""
        return self.members(system)[0].attack.plan(system)

    def summaries(self) -> tuple[str, str, str]:
        """The first member's threat model and objective, and the names of all."""
        threat, objective, _ = super().summaries()
        return threat, objective, f"ensemble {self.version}"

    def __call__(
        self,
        system: System,
        x: Tensor,
        y: Tensor,
        goal_class: Tensor | None = None,
        goal_map: Tensor | None = None,
    ) -> Attacked:
        """As :meth:`Attack.__call__`; ``member`` of the result says whose input each is.

        Raises:
            NotDifferentiableError: no member can attack such a system.
            UnsupportedModelError: likewise.
        """
        self._check(system, x, y, goal_class, goal_map)
        goal_map = self.default_goal_map(x) if goal_map is None else goal_map
        judge = _Judge.of(self, system, x, y, goal_class, goal_map)
        total, refused = _Total.none(x), None
        for member in self.members(system):
            live = (~total.fallen).nonzero()[:, 0]
            if not len(live):
                break
            target = self.known.root if member.transfer and self.known.root is not None else system
            given = [None if t is None else t.to(x.device)[live] for t in (goal_class, goal_map)]
            try:
                made = member.attack.adapted(target)(target, x[live], y.to(x.device)[live], *given)
            except (NotDifferentiableError, UnsupportedModelError) as error:
                refused = error
                continue
            total.take(self.names.index(member.name), live, made, judge(live, made.x), len(judge.systems))
        if refused is not None and bool((total.member < 0).all()):
            raise refused
        return total.attacked(judge)

    def inputs(
        self,
        system: System,
        x: Tensor,
        y: Tensor,
        goal_class: Tensor | None = None,
        goal_map: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Attack.inputs`, with no pass less: whose input is returned depends on the judgement."""
        return self(system, x, y, goal_class, goal_map).x

    def differentiates(self, system: System) -> bool:
        """Never as a whole: members that need a gradient which is not there are left out."""
        return False

    def _forging(self) -> tuple[Member, ...]:
        eps, seed = self.eps, self.seed
        # Two runs from different points win more samples than one of all their steps.
        again = MapPGD(eps, steps=5 * STEPS // 2, random_start=True, seed=seed + 1)
        heavy = ADV2(eps, steps=STEPS, step_size=max(eps / 8, 1e-6), weight=100.0, confidence=0.0, seed=seed)
        return (
            Member("map-pgd", MapPGD(eps, steps=STEPS, seed=seed)),
            Member(_LONG, MapPGD(eps, steps=2 * STEPS, random_start=True, seed=seed)),
            Member("map-pgd from another start", again),
            Member("adv2, ten times the weight", heavy),
            Member("transfer", MapPGD(eps, steps=STEPS // 2, seed=seed), transfer=True),
            self._black_box(),
        )

    def _matching(self) -> tuple[Member, ...]:
        eps, seed = self.eps, self.seed
        return (
            Member("map-pgd", MapPGD(eps, "match", STEPS, seed=seed)),
            Member(_LONG, MapPGD(eps, "match", 2 * STEPS, random_start=True, seed=seed)),
            Member("dombrowski", Dombrowski(eps, steps=STEPS, tolerance=1.0, seed=seed)),
            Member("transfer", MapPGD(eps, "match", STEPS, seed=seed), transfer=True),
            self._black_box(),
        )

    def _moving(self) -> tuple[Member, ...]:
        eps, seed = self.eps, self.seed
        return (
            Member("map-pgd", MapPGD(eps, "move", STEPS, seed=seed)),
            Member(_LONG, MapPGD(eps, "move", 2 * STEPS, seed=seed + 1)),
            Member("ghorbani-topk", GhorbaniTopK(eps, steps=STEPS, evaluate_every=5, seed=seed)),
            Member("ghorbani-center", GhorbaniCenter(eps, steps=STEPS, evaluate_every=5, seed=seed)),
            Member("transfer", MapPGD(eps, "move", STEPS, seed=seed), transfer=True),
            self._black_box(),
        )

    def _black_box(self) -> Member:
        """The control: it is stronger only where gradients are masked."""
        eps, seed = self.eps, self.seed
        if self.aim == "move":
            step = max(eps / 20, 1e-6)
            return Member("random signs", GhorbaniRandom(eps, steps=2 * STEPS, step_size=step, seed=seed))
        if self.aim == "match":
            step = max(eps / 20, 1e-6)
            return Member("evolution", Evolution(eps, steps=1 + STEPS // 6, population=12, step_size=step, seed=seed))
        step = max(eps / 10, 1e-6)
        spsa = SPSA(eps, step_size=step, samples=16, max_queries=18 + STEPS, joint=True, weight=100.0, seed=seed)
        return Member("spsa", spsa)


@dataclass(frozen=True, eq=False)
class _Judge:
    """Decides on the real system how far an input got: the unmet conditions, then the distance.

    A system that draws is looked at under several draws of the judge's own: a sample falls where it does under each,
    and counts by the worst condition and the mean distance, since nobody knows the draws by which it will be judged.
    """

    systems: tuple[System, ...]
    wanted: tuple[Tensor, ...]
    known: Known
    x: Tensor
    label: Tensor
    goal_class: Tensor | None
    away: bool

    @classmethod
    def of(
        cls, auto: Auto, system: System, x: Tensor, y: Tensor, goal_class: Tensor | None, goal_map: Tensor | None
    ) -> _Judge:
        drawn: tuple[System, ...] = (system,)
        if system.random:
            drawn = tuple(system.redrawn(derive(auto.seed, "auto judges", i)) for i in range(JUDGES))
        with torch.no_grad():
            benign = [one(x) for one in drawn]
        wanted = tuple(seen.maps if goal_map is None else goal_map.to(seen.maps) for seen in benign)
        goal_class = benign[0].prediction if auto.keeps_prediction else goal_class
        goal_class = None if goal_class is None else goal_class.to(x.device)
        return cls(drawn, wanted, auto.known, x, y.to(x.device), goal_class, auto.moves_map)

    @torch.no_grad()
    def __call__(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the inputs at ``rows``: conditions unmet, distance (less is better), whether the sample falls."""
        found = [
            self._by(system, wanted[rows], rows, x) for system, wanted in zip(self.systems, self.wanted, strict=True)
        ]
        unmet, distance, falls = (torch.stack(part) for part in zip(*found, strict=True))
        return unmet.amax(0), distance.mean(0), falls.all(0)

    def _by(self, system: System, wanted: Tensor, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        finite = answer(system.model, x, finite=False).isfinite().all(1)
        # An answer that is not finite is no success, and nothing explains it.
        seen = system(torch.where(ops.expand(finite, x), x, self.x[rows]))
        goal = None if self.goal_class is None else self.goal_class[rows]
        unmet = 2 * (~(hit(seen.logits, self.label[rows], goal) & finite)).float()
        unmet += 0.0 if seen.alarm is None else seen.alarm.float()
        distance = self.known.apart(seen.maps, wanted)
        limit = self.known.limit[rows] if isinstance(self.known.limit, Tensor) else self.known.limit
        near = torch.zeros_like(finite) if limit is None else (distance <= limit) ^ self.away
        return unmet, -distance if self.away else distance, (unmet == 0) & near


@dataclass(eq=False)
class _Total:
    """Per sample the farthest that any member got; figures of the searches together."""

    x: Tensor
    member: Tensor
    unmet: Tensor
    distance: Tensor
    fallen: Tensor
    queries: Tensor
    zero_direction: Tensor
    stalled: Tensor
    misled: Tensor

    @classmethod
    def none(cls, x: Tensor) -> _Total:
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        yes, far = count == 0, torch.full((len(x),), torch.inf, device=x.device)
        return cls(x.detach().clone(), count - 1, far, far.clone(), ~yes, count, yes, yes.clone(), yes.clone())

    def take(
        self, index: int, rows: Tensor, made: Attacked, verdict: tuple[Tensor, Tensor, Tensor], looks: int
    ) -> None:
        """What a member made of the samples at ``rows``, and how often the judge looked at each."""
        unmet, distance, falls = verdict
        before, least = self.unmet[rows], self.distance[rows]
        # Of inputs that deceive nobody, the nearest map is the unchanged one's: the first member's stays.
        better = (unmet < before) | ((unmet == before) & (unmet < 2) & (distance < least))
        won = rows[better]
        self.x[won], self.member[won] = made.x[better], index
        self.unmet[won], self.distance[won] = unmet[better], distance[better].to(self.distance)
        self.fallen[rows] |= falls
        self.queries[rows] += made.queries.to(self.queries) + looks
        # Only where it is true of all members is it true of the attack.
        self.zero_direction[rows] &= made.zero_direction
        self.stalled[rows] &= made.stalled
        self.misled[rows] &= made.surrogate_misled

    def attacked(self, judge: _Judge) -> Attacked:
        """The result, judged afresh as any attack's."""
        with torch.no_grad():
            logits = answer(judge.systems[0].model, self.x, finite=False)
        success = hit(logits, judge.label, judge.goal_class) & logits.isfinite().all(1)
        return Attacked(
            self.x, success, self.zero_direction, self.stalled, self.misled, self.queries, member=self.member
        )
