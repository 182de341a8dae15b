"""DeepFool: repeated steps to the nearest linearised class boundary."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.autograd.straight_through import straight_through
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, NonNegative
from robustexplain.hidden import refuse_hidden
from robustexplain.objectives import Goal, Margin, Objective, margin
from robustexplain.random_streams import Streams, derive
from robustexplain.registry import ATTACKS
from robustexplain.rounding import wide
from robustexplain.system import System, draws

from ..adaptive import Adaptation
from ..base import Attack
from ..search.loop import Plan, SearchResult
from ..threat import Threat
from .carlini_wagner import Box

_BEYOND = 1e-4
"""Added to each step's length, as in the authors' code: a step that ends on the boundary changes no prediction."""


@dataclass(frozen=True)
class _LinearisedBoundaries(Plan):
    """Each sample steps to its nearest linearised boundary until it is past one."""

    threat: Threat
    steps: int
    norm: Literal["l2", "linf"]
    overshoot: float
    candidates: int
    adapt: Adaptation

    @property
    def aim(self) -> Objective:
        return Margin()

    @property
    def summary(self) -> str:
        return ", ".join(
            part for part in (f"linearised boundaries, {self.norm}", self.adapt.direction().summary) if part
        )

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        x, total = goal.x.clone(), torch.zeros_like(wide(goal.x))
        queries = torch.zeros_like(goal.label)
        first, lowest = x.new_full((len(x),), torch.inf), x.new_full((len(x),), torch.inf)
        rows, rivals = torch.arange(len(x), device=x.device), None
        for number in range(self.steps + 1):
            here = goal.select(rows)
            leaf = x[rows].requires_grad_()
            logits = answer(system.model, leaf)
            queries[rows] += 1
            behind = margin(logits.detach(), here).to(x.dtype)
            first[rows] = behind if number == 0 else first[rows]
            lowest[rows] = torch.minimum(lowest[rows], behind)
            rivals = self._rivals(logits.detach(), here) if rivals is None else rivals
            live = behind >= 0
            if number == self.steps or not bool(live.any()):
                break
            if self.adapt != Adaptation():
                rows, rivals, live = rows[live], rivals[live], live[live]
                leaf, here = x[rows].requires_grad_(), goal.select(rows)
                logits, shown = self._differentiable(system, leaf, number)
                queries[rows] += shown
            move = self._move(logits, leaf, here, rivals, live)
            rows, rivals = rows[live], rivals[live]
            total[rows] += move
            x[rows] = self.threat.project(goal.x[rows], goal.x[rows] + (1 + self.overshoot) * total[rows])
        return SearchResult.of(x, queries, (lowest >= first) & (lowest >= 0))

    def _differentiable(self, system: System, leaf: Tensor, number: int) -> tuple[Tensor, int]:
        """The mean logits of the draws, straight through rounding if the adaptation says so, and their number."""
        several = self.adapt.draws if draws(system.model) else 1
        seeds = (derive(number, "redraw", draw) for draw in range(several))
        systems = [system] if several == 1 else [system.redrawn(seed) for seed in seeds]
        if self.adapt.straight:
            refuse_hidden(system.model, "straight-through gradients replace function calls of the model")
        with straight_through() if self.adapt.straight else nullcontext():
            return torch.stack([answer(drawn.model, leaf) for drawn in systems]).mean(0), several

    def _rivals(self, logits: Tensor, goal: Goal) -> Tensor:
        """``[B, k]``: the classes whose boundaries are considered."""
        if goal.goal_class is not None:
            return goal.goal_class[:, None]
        others = logits.scatter(1, goal.label[:, None], -torch.inf)
        return others.topk(min(self.candidates, logits.shape[1]) - 1, dim=1).indices

    def _move(self, logits: Tensor, leaf: Tensor, goal: Goal, rivals: Tensor, live: Tensor) -> Tensor:
        """The step to the nearest linearised boundary, for the samples that are ``live``."""
        # Targeted: the boundary between the goal class and the currently predicted class.
        ahead = goal.label if goal.goal_class is None else logits.argmax(1)
        gaps = logits.gather(1, rivals) - logits.gather(1, ahead[:, None])
        planes = [torch.autograd.grad(gap.sum(), leaf, retain_graph=True)[0][live] for gap in gaps.unbind(1)]
        normals = wide(torch.stack(planes, 1))
        f = gaps.detach()[live].to(normals.dtype)
        dual = normals.flatten(2).norm(p=2 if self.norm == "l2" else 1, dim=2)
        distance = torch.where(dual > 0, f.abs() / dual.clamp(min=torch.finfo(f.dtype).tiny), torch.inf)
        length, nearest = distance.min(1)
        normal = normals[torch.arange(len(nearest), device=leaf.device), nearest]
        flat = length.isinf()
        size = ops.expand(length.masked_fill(flat, 0) + _BEYOND, normal)
        if self.norm == "linf":
            return size * normal.sign()
        scale = dual.gather(1, nearest[:, None])[:, 0].masked_fill(flat, 1)
        return size * normal / ops.expand(scale, normal)


@ATTACKS.register("deepfool", paper="Moosavi-Dezfooli et al. 2016, Algorithm 2, section 3.3", needs=("gradients",))
@dataclass(frozen=True)
class DeepFool(Attack):
    """Steps to the nearest linearised class boundary until the prediction changes: close to the smallest change.

    ``x_{i+1} = x_i + |f'_l| / ||w'_l||_q^q |w'_l|^{q-1} sign(w'_l)`` with the logit gaps ``f'`` to the label and their
    gradients ``w'``; the sum of all steps is stretched by ``1 + overshoot`` at each iteration, as in the authors' code,
    and each step is longer by 1e-4. Departures: images are clipped to ``[0, 1]``; the class to leave is the label
    given. The paper is untargeted: with a goal class, each step goes to the boundary between that class and the
    currently predicted one. A step costs one forward pass and a backward pass for each candidate.

    Args:
        steps: iterations at most.
        norm: ``l2`` or ``linf``, of the change.
        overshoot: ``eta``.
        candidates: number of classes considered, label included: those with the largest logits at the start.
        adapt: to rounding and randomness, of which each step then looks at the adapted logits too; ``evade`` is 0.
    """

    steps: Count = 50
    norm: Literal["l2", "linf"] = "l2"
    overshoot: NonNegative = 0.02
    candidates: Count = 10
    adapt: Adaptation = field(default_factory=Adaptation)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapt.evade:
            problem = f"must be 0: there is no loss to which a detector could be added; got {self.adapt.evade!r}"
            raise FieldError("DeepFool", "adapt.evade", problem)

    def _changes(self, system: System) -> dict[str, Any]:
        return {"adapt": replace(self.adapt.to(system), evade=0.0)}

    def plan(self, system: System) -> Plan:
        """Steps to linearised boundaries.

        Raises:
            InputError: more than one draw, and nothing in the system is random.
        """
        if self.adapt.draws > 1 and not system.random:
            raise InputError(f"draws={self.adapt.draws}: nothing in this system is random; use draws=1")
        candidates = max(2, self.candidates)
        return _LinearisedBoundaries(Box(), self.steps, self.norm, self.overshoot, candidates, self.adapt)
