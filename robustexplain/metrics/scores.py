"""Metrics of a single map: how complex it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import maps as ops
from ..registry import METRICS
from .base import Better, MapScore


@METRICS.register("complexity", paper="Bhatt et al. 2020 (complexity)")
@dataclass(frozen=True)
class Complexity(MapScore):
    """Entropy of the magnitudes' shares in nats, from 0 (one pixel) to ``log N`` (flat); lower is easier to grasp.

    An all-zero map prefers no pixel and counts as flat (Quantus gives NaN). The same figure as ``entropy``, which reads
    it the other way round: an attacker's success.
    """

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, math.inf)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor) -> Tensor:
        return ops.entropy(maps)


@METRICS.register("sparseness", paper="Chalasani et al. 2020 (Gini index)")
@dataclass(frozen=True)
class Sparseness(MapScore):
    """Gini index of the magnitudes, from 0 (flat) to ``1 - 1/N`` (one pixel); higher is sparser.

    An all-zero map counts as flat.
    """

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor) -> Tensor:
        shares = ops.ascending(ops.distribution(maps))
        n = shares.shape[1]
        weights = (2 * torch.arange(1, n + 1, device=maps.device, dtype=maps.dtype) - n - 1) / n
        # A flat map's shares cancel only up to rounding.
        return (shares * weights).sum(1).clamp(min=0)
