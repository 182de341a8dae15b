"""Faithfulness by replacing pixels in the map's order: AOPC, deletion, insertion.

In a table, columns are replaced by ``zero`` or by the ``mean`` of the model's own normalisation; use the second where
a column's values are far from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..fields import Count, Natural
from ..registry import METRICS
from .base import Better, Faithfulness
from .perturbing import Replacement, region_order, replaced, sweep, trapezoid


@dataclass(frozen=True)
class RegionRemoval(Faithfulness):
    """Mean fall of the score as regions are replaced, in an order that the subclass names."""

    patch: Count = 9
    regions: Count = 100
    replacement: Replacement = "noise"
    seed: Natural = 0

    ascending: ClassVar[bool]
    """Whether the least relevant regions go first."""

    def curve(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        """``f(x_k)`` for ``k = 0 .. L``, ``[B, L + 1]``; arguments are not checked."""
        order, regions = region_order(maps, self.patch, ascending=self.ascending)
        cuts = torch.arange(min(self.regions, regions) + 1, device=x.device)
        gone = replaced(x, self.replacement, self.seed, model)
        return sweep(lambda some, t: self._scores(model, some, t), x, gone, order, cuts, target, self.batch_size)

    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        curve = self.curve(model, x, maps, target)
        return (curve[:, :1] - curve).mean(1)


@METRICS.register("aopc", paper="Samek et al. 2017 (AOPC); Heo et al. 2019", needs=("model",))
@dataclass(frozen=True)
class AOPC(RegionRemoval):
    """Area over the perturbation curve: mean fall of the score as regions go, most relevant first; high is faithful.

    ``1 / (L + 1) sum_{k = 0..L} f(x_0) - f(x_k)``, where ``x_k`` has the ``k`` most relevant regions replaced (MoRF).
    Departure: noise is drawn once for the image, so a region looks the same at every later step.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        patch: side of a region in pixels (the paper: 9); in a table every column is a region.
        regions: ``L``, how many are replaced at most.
        replacement: the value of a removed pixel (the paper: ``noise``).
        seed: of the noise.
    """

    ascending: ClassVar[bool] = False
    better: ClassVar[Better] = "higher"


@METRICS.register("aopc-lerf", paper="Samek et al. 2017 (LeRF)", needs=("model",))
@dataclass(frozen=True)
class LeastRelevantFirst(RegionRemoval):
    """The fall of the score as in ``aopc``, but least relevant regions first (LeRF); low is faithful.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        patch: side of a region in pixels; in a table every column is a region.
        regions: how many are replaced at most.
        replacement: the value of a removed pixel.
        seed: of the noise.
    """

    ascending: ClassVar[bool] = True
    better: ClassVar[Better] = "lower"


@METRICS.register("deletion", paper="Petsiuk et al. 2018, section 4.1", needs=("model",))
@dataclass(frozen=True)
class Deletion(Faithfulness):
    """Area under the score as pixels are removed, most important first; low is faithful.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        pixels: how many (or columns) are removed between two evaluations; 0 is one row's worth (the paper: 224 of
            224 x 224), in a table one column.
        replacement: the value of a removed pixel (the paper: ``zero``).
        seed: of noise.
    """

    pixels: Natural = 0
    replacement: Replacement = "zero"
    seed: Natural = 0

    better: ClassVar[Better] = "lower"

    def curve(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        """The score at each step, from the whole image to none of it, ``[B, S]``."""
        return _pixel_curve(self, model, x, replaced(x, self.replacement, self.seed, model), maps, target)

    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        return trapezoid(self.curve(model, x, maps, target))


@METRICS.register("insertion", paper="Petsiuk et al. 2018, section 4.1", needs=("model",))
@dataclass(frozen=True)
class Insertion(Faithfulness):
    """Area under the score as pixels are shown, most important first; high is faithful.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        pixels: how many (or columns) are shown between two evaluations; 0 is one row's worth (the paper: 224 of
            224 x 224), in a table one column.
        replacement: the value of a pixel before it is inserted (the paper: ``blur``).
        seed: of noise.
    """

    pixels: Natural = 0
    replacement: Replacement = "blur"
    seed: Natural = 0

    better: ClassVar[Better] = "higher"

    def curve(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        """The score at each step, from none of the image to all of it, ``[B, S]``."""
        return _pixel_curve(self, model, replaced(x, self.replacement, self.seed, model), x, maps, target)

    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        return trapezoid(self.curve(model, x, maps, target))


def _pixel_curve(
    metric: Deletion | Insertion, model: nn.Module, start: Tensor, end: Tensor, maps: Tensor, target: Tensor
) -> Tensor:
    order, pixels = region_order(maps, 1)
    step = metric.pixels or (maps.shape[2] if maps.dim() == 3 else 1)
    # Where the step does not divide the pixels, the last one is smaller, as in the authors' code.
    cuts = torch.arange(math.ceil(pixels / step) + 1, device=start.device) * step
    return sweep(lambda some, t: metric._scores(model, some, t), start, end, order, cuts, target, metric.batch_size)
