"""Feature deletion: delete the pixels that the map ranks highest; needs the map and no gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction
from robustexplain.interpreters.perturbation.removal import Fill
from robustexplain.objectives import Goal, Misclassify, Objective
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..base import Attack
from ..search.best import BestIterates, SearchRecord
from ..search.directions import observe
from ..search.loop import Plan, SearchResult
from ..threat import Threat
from .carlini_wagner import Box


@dataclass(frozen=True)
class _Delete(Plan):
    """Replace growing shares of the top-attributed pixels by the fill."""

    threat: Threat
    area: float
    steps: int
    fill: Fill
    seed: int

    @property
    def aim(self) -> Objective:
        return Misclassify()

    @property
    def summary(self) -> str:
        return f"delete up to {self.area:.0%} by attribution"

    @torch.no_grad()
    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        if goal.benign_map is None:
            raise InputError("feature deletion needs the benign map")
        rank = _ranks(goal.benign_map, goal.x)
        fill = self.fill(goal.x, self.seed)
        pixels = rank[0].numel()
        best, record = BestIterates.none(goal.x), SearchRecord.none(goal.x)
        rows, last = torch.arange(len(goal.x), device=goal.x.device), -1
        for step in range(self.steps + 1):
            count = int(self.area * pixels * step / self.steps + 1e-9)
            if count == last or not len(rows):
                continue
            last = count
            x = torch.where((rank[rows] < count)[:, None], fill[rows], goal.x[rows])
            here = goal.select(rows)
            done = best.update(rows, observe(system, x, here, frozenset()), here, self.aim)
            record.queries[rows] += 1
            rows = rows[~done]
        return SearchResult.judged(best, record)


def _ranks(maps: Tensor, x: Tensor) -> Tensor:
    """``[B, H, W]``: each pixel's rank by attribution, 0 for the largest; ties in order of position."""
    flat = ops.resize(maps, x.shape[-2:]).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    places = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=x.device).expand_as(order))
    return places.reshape(len(x), *x.shape[-2:])


@ATTACKS.register("feature-deletion", paper="Samek et al. 2017, section III (removal in the map's order)")
@dataclass(frozen=True)
class FeatureDeletion(Attack):
    """Replaces the pixels that the map ranks highest, more and more of them, until the prediction is as wanted.

    Samek et al. measure the quality of a map this way; here the deletion is the attack and stops at its first success.
    Pixels are ranked by the signed map of the benign prediction, computed once. It needs no gradient. The more faithful
    the map, the smaller the area that must be deleted.

    Args:
        area: share of the pixels that may be deleted.
        steps: number of evenly spaced shares up to ``area`` that are tried.
        fill: replaces deleted pixels: a colour, a blur or noise.
    """

    area: Fraction = 0.3
    steps: Count = 30
    fill: Fill = field(default_factory=Fill)

    needs_maps: ClassVar[bool] = True

    def differentiates(self, system: System) -> bool:
        """Never: it uses the maps' values only."""
        return False

    def plan(self, system: System) -> Plan:
        """Deletion in growing shares."""
        return _Delete(Box(), self.area, self.steps, self.fill, self.seed)
