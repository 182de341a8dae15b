"""Normalised AOPC: where a map stands between the worst and the best order that there are for its model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import Count, Natural
from ..registry import METRICS
from .base import Better, Faithfulness
from .perturbing import Replacement, over_channels, region_order, replaced


@METRICS.register("naopc", paper="Edin et al. 2025 (arXiv:2408.08137)", needs=("model",))
@dataclass(frozen=True)
class NormalisedAOPC(Faithfulness):
    """AOPC between the smallest (0) and the largest (1) that any order of the regions has; high is faithful.

    ``AOPC`` depends on how fast a model's score falls at all, so figures of two models do not compare; this one does.
    Both limits are the best orders that a beam search finds, the map's own order and its reverse among them: exact
    where ``beam`` is at least the largest number of sets of one size, an inner bound elsewhere. NaN where all orders
    are equal: the model uses no region. Costs about ``beam R^2`` passes of the model for ``R`` regions.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        side: regions along each side of the image; in a table every column is a region.
        beam: orders kept at each step (the authors: 5); of two that removed the same regions the better one is kept.
        replacement: the value of a removed pixel.
        seed: of noise.
    """

    side: Count = 4
    beam: Count = 5
    replacement: Replacement = "mean"
    seed: Natural = 0

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)

    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        places, values = self._regions(maps)
        falls = _Falls(self, model, x, replaced(x, self.replacement, self.seed, model), places, target)
        count = values.shape[1]
        order, _ = region_order(values, 1)
        own, reverse = falls.along(order), falls.along(count - 1 - order)
        best, worst = falls.limit(1, count), falls.limit(-1, count)
        high, low = torch.stack([own, reverse, best]).amax(0), torch.stack([own, reverse, worst]).amin(0)
        # What remains is rounding, of scores of that size.
        size = torch.stack([falls.whole.abs(), high.abs() / count, low.abs() / count]).amax(0)
        flat = high - low <= 1e-6 * count * size
        return torch.where(flat, torch.nan, (own - low) / torch.where(flat, 1, high - low))

    def _regions(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The region of each pixel or column, ``[H, W]`` or ``[D]``, and the map's sum in each, ``[B, R]``."""
        if maps.dim() == 2:
            return torch.arange(maps.shape[1], device=maps.device), maps
        height, width = maps.shape[1:]
        rows, columns = (torch.arange(n, device=maps.device) * min(self.side, n) // n for n in (height, width))
        places = rows[:, None] * min(self.side, width) + columns
        count = int(places.max()) + 1
        return places, maps.flatten(1) @ F.one_hot(places.flatten(), count).to(maps)


@dataclass(frozen=True)
class _Falls:
    """Falls of the score of one batch when sets of regions are replaced."""

    metric: NormalisedAOPC
    model: nn.Module
    x: Tensor
    gone: Tensor
    places: Tensor
    target: Tensor

    @cached_property
    def whole(self) -> Tensor:
        """The score of the inputs as they are."""
        step = self.metric.batch_size
        parts = zip(self.x.split(step), self.target.split(step), strict=True)
        return torch.cat([self.metric._scores(self.model, some, classes) for some, classes in parts])

    def of(self, rows: Tensor, sets: Tensor) -> Tensor:
        """``f(x) - f(x without the set)``, ``[n]``, for samples ``rows`` ``[n]`` and sets, bool ``[n, R]``."""
        found, step = [], self.metric.batch_size
        for some, removed in zip(rows.split(step), sets.split(step), strict=True):
            x = self.x[some]
            shown = torch.where(over_channels(removed[:, self.places], x), self.gone[some], x)
            found.append(self.metric._scores(self.model, shown, self.target[some]))
        return self.whole[rows] - torch.cat(found)

    def along(self, order: Tensor) -> Tensor:
        """The sum of the falls along orders ``[B, R]``: the step at which each region goes."""
        batch, count = order.shape
        steps = torch.arange(1, count + 1, device=order.device)
        rows = torch.arange(batch, device=order.device).repeat_interleave(count)
        return self.of(rows, (order[:, None] < steps[:, None]).flatten(0, 1)).reshape(batch, count).sum(1)

    def limit(self, sign: int, count: int) -> Tensor:
        """The largest (``sign`` 1) or smallest (-1) sum of the falls that the beam search finds, ``[B]``."""
        kept: list[dict[frozenset[int], float]] = [{frozenset(): 0.0} for _ in self.x]
        for _ in range(count):
            grown = [
                (row, before | {region}, total)
                for row, sets in enumerate(kept)
                for before, total in sets.items()
                for region in range(count)
                if region not in before
            ]
            removed = torch.zeros(len(grown), count, dtype=torch.bool)
            removed[[[i] for i in range(len(grown))], [sorted(after) for _, after, _ in grown]] = True
            rows = torch.tensor([row for row, _, _ in grown])
            falls = self.of(rows.to(self.x.device), removed.to(self.x.device)).tolist()
            kept = [{} for _ in self.x]
            for (row, after, total), fall in zip(grown, falls, strict=True):
                known = kept[row].get(after, -sign * math.inf)
                kept[row][after] = max(known * sign, (total + fall) * sign) * sign
            kept = [self._best(sets, sign) for sets in kept]
        return self.whole.new_tensor([next(iter(sets.values())) for sets in kept])

    def _best(self, sets: dict[frozenset[int], float], sign: int) -> dict[frozenset[int], float]:
        return dict(sorted(sets.items(), key=lambda item: -sign * item[1])[: self.metric.beam])
