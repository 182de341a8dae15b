"""The importance of one column in the map of a table: its rank, whether it is first, its share.

Importance is magnitude. In a map of equal magnitudes (also all zero) every column has the middle rank and a share of
``1 / D``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import maps as ops
from ..checks import Kind
from ..features import Feature, index_of
from ..registry import METRICS
from .base import Better, MapScore
from .ranking import ranks


@METRICS.register(
    "feature-rank", paper="Dimanov et al. 2020, section 4; Slack et al. 2020, section 4", needs=("tables",)
)
@dataclass(frozen=True)
class FeatureRank(MapScore):
    """Rank of a column by magnitude, from 1 (the most important) to ``D``; ties share their average rank.

    An attack that hides the column raises its rank.

    Args:
        feature: the column, by index; by name until the names of the data are known.
    """

    feature: Feature

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (1, math.inf)
    takes: ClassVar[tuple[Kind, ...]] = ("tables",)
    columns: ClassVar[tuple[str, ...]] = ("feature",)

    def _measure(self, maps: Tensor) -> Tensor:
        column = index_of(self.feature, width=maps.shape[1])
        return ranks(-maps.abs())[:, column].to(maps.dtype)


@METRICS.register("feature-first", paper="Slack et al. 2020, section 4", needs=("tables",))
@dataclass(frozen=True)
class FeatureFirst(MapScore):
    """Whether a column has the largest magnitude, in ``[0, 1]``: ``1 / n`` where it is tied with ``n - 1`` others.

    Its mean is the share of rows on which the column is named first. Departure: in Slack et al.'s code ties go to the
    column that stands first in the explainer's list, and a column of weight 0 is never named.

    Args:
        feature: the column, by index; by name until the names of the data are known.
    """

    feature: Feature

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    binary: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("tables",)
    columns: ClassVar[tuple[str, ...]] = ("feature",)

    def _measure(self, maps: Tensor) -> Tensor:
        column = index_of(self.feature, width=maps.shape[1])
        size = maps.abs()
        first = size == size.amax(1, keepdim=True)
        return first[:, column].to(maps.dtype) / first.sum(1)


@METRICS.register("feature-share", needs=("tables",))
@dataclass(frozen=True)
class FeatureShare(MapScore):
    """Share of a column in the magnitudes of all, ``|m_j| / sum |m|``, in ``[0, 1]``.

    Args:
        feature: the column, by index; by name until the names of the data are known.
    """

    feature: Feature

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("tables",)
    columns: ClassVar[tuple[str, ...]] = ("feature",)

    def _measure(self, maps: Tensor) -> Tensor:
        column = index_of(self.feature, width=maps.shape[1])
        return ops.distribution(maps)[:, column]
