"""How far a manipulated model's maps have been fooled (Heo et al. 2019).

Correlations, entropy and the losses are those of arXiv v1 (equations 3 to 6, section 4.2), of the published version
(success ranges, Spearman for active fooling) and of the authors' code (top-k, centre of mass); each
docstring says which. All are to be computed on the method's own grid, the last convolution's, as in the paper.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .. import maps as ops
from ..checks import Kind
from ..errors import FieldError, InputError
from ..fields import Positive, check_k
from ..registry import METRICS
from .base import Better, MapMetric, MapScore, Metric, check_kind, check_pair, widened
from .ranking import ranks

CODE_THRESHOLD = 0.15
"""The authors' result notebooks count test losses above this, whatever the kind of fooling."""


@METRICS.register("sign-correlation", paper="Heo et al. 2019, arXiv v1 section 4.2")
@dataclass(frozen=True)
class SignCorrelation(MapMetric):
    """Pearson's correlation of the sign vectors of outstanding pixels, in ``[-1, 1]``; 1 is equal.

    A pixel stands out if ``|h| > mean|h| + std|h|``. NaN if in either map none does, as in a flat one.
    """

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1, 1)

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        return ops.correlation(*(ops.sign_vector(m.detach()) for m in (maps, reference)))


@METRICS.register("location-correlation", paper="Heo et al. 2019, arXiv v1 section 4.2")
@dataclass(frozen=True)
class LocationCorrelation(MapScore):
    """Pearson's correlation of a map's sign vector with the frame of location fooling, in ``[-1, 1]``.

    High is fooled. NaN if no pixel stands out, as in a flat map, or if all outstanding pixels lie on the frame.
    """

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (-1, 1)
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _measure(self, maps: Tensor) -> Tensor:
        mask = ops.frame(maps).flatten().expand(len(maps), -1)
        return ops.correlation(ops.sign_vector(maps.detach()), mask)


@METRICS.register("entropy", paper="Heo et al. 2019, arXiv v1 eq. 4")
@dataclass(frozen=True)
class Entropy(MapScore):
    """Entropy of the magnitudes' shares in nats, from 0 to ``log N``; high is fooled (uniform fooling).

    An all-zero map counts as uniform.
    """

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, math.inf)
    differentiable: ClassVar[bool] = True

    def _measure(self, maps: Tensor) -> Tensor:
        return ops.entropy(maps)


class BiTarget(NamedTuple):
    """Coordinates ``[B]`` of a swapped explanation: its sign correlation with its own class and with the other's."""

    own: Tensor
    other: Tensor


def bi_target_correlation(maps: Tensor, own: Tensor, other: Tensor) -> BiTarget:
    """Active fooling's two sign correlations: fooled is low with ``own`` and high with ``other``.

    The formula in section 4.2 of arXiv v1 names ``c_2`` twice in its second term; this is what its text describes.

    Args:
        maps: the manipulated model's maps for class ``c_1``, ``[B, H, W]``.
        own: the original model's maps for ``c_1``.
        other: the original model's maps for ``c_2``.
    """
    metric = SignCorrelation()
    return BiTarget(metric(maps, own), metric(maps, other))


@dataclass(frozen=True)
class Fooling(Metric):
    """A test loss of fooling, a number per sample: ``metric(maps, original, other=None)`` gives ``[B]``.

    Args:
        low: the fooling succeeded if the loss lies from here ...
        high: ... to here.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low <= self.high:
            raise FieldError(type(self).__name__, "low", f"must not exceed high = {self.high!r}, got {self.low!r}")

    def __call__(self, maps: Tensor, original: Tensor, other: Tensor | None = None) -> Tensor:
        """``[B]`` from the manipulated model's maps and the original model's, ``[B, H, W]`` each.

        Args:
            maps: the manipulated model's.
            original: the original model's, of the same class.
            other: the original model's of the class that active fooling swaps in.

        Raises:
            InputError: unequal shapes, maps that are not finite, or an active fooling without ``other``.
        """
        check_pair(maps, original)
        check_kind(self, maps)
        if other is not None:
            check_pair(maps, other)
        wide = None if other is None else widened(other)
        return self._loss(widened(maps), widened(original), wide).to(maps.dtype)

    def success(self, loss: Tensor) -> Tensor:
        """``[B]`` bool, whose mean is the fooling success rate; an undefined loss (NaN) is no success."""
        return (loss >= self.low) & (loss <= self.high)

    @abstractmethod
    def _loss(self, maps: Tensor, original: Tensor, other: Tensor | None) -> Tensor:
        """``[B]``; maps are checked."""


@METRICS.register("fooled-location", paper="Heo et al. 2019, arXiv v1 eq. 3; success range: published version")
@dataclass(frozen=True)
class FooledLocation(Fooling):
    """Mean squared distance of the min-max rescaled map to the frame, in ``[0, 1]``; low is fooled."""

    low: float = 0.0
    high: float = 0.2

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _loss(self, maps: Tensor, original: Tensor, other: Tensor | None) -> Tensor:
        loss: Tensor = (ops.minmax(maps) - ops.frame(maps)).square().flatten(1).mean(1)
        return loss


@METRICS.register("fooled-top-k", paper="Heo et al. 2019, published version and code")
@dataclass(frozen=True)
class FooledTopK(Fooling):
    """Mean squared rescaled value left where the original map was highest, in ``[0, 1]``; low is fooled.

    Args:
        low: see :class:`Fooling`.
        high: see :class:`Fooling`.
        k: a count from 1 on, a share of the pixels below 1.
    """

    low: float = 0.0
    high: float = 0.3
    k: Positive = 0.1

    better: ClassVar[Better] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k)

    def _loss(self, maps: Tensor, original: Tensor, other: Tensor | None) -> Tensor:
        k = ops.top_k_count(self.k, maps[0].numel())
        return (ops.minmax(maps).flatten(1).square() * ops.top_k(original, k)).sum(1) / k


@METRICS.register("fooled-center", paper="Heo et al. 2019, published version and code")
@dataclass(frozen=True)
class FooledCenter(Fooling):
    """How far the min-max rescaled map's centre moved, as a share of the diagonal, in ``[0, 1]``; high is fooled.

    ``sqrt((dh^2 + dw^2) / 2)`` of shifts as shares of ``side - 1``, as the authors' code tests it (it trains another
    function, ``|dh| + |dw|``, and takes the maps to be square, which we do not).
    """

    low: float = 0.1
    high: float = 1.0

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    differentiable: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _loss(self, maps: Tensor, original: Tensor, other: Tensor | None) -> Tensor:
        shift = ops.center_of_mass(ops.minmax(maps)) - ops.center_of_mass(ops.minmax(original))
        sides = shift.new_tensor([max(1, side - 1) for side in maps.shape[1:]])
        loss: Tensor = torch.linalg.vector_norm(shift / sides, dim=1) / 2**0.5
        return loss


@METRICS.register("fooled-active", paper="Heo et al. 2019, published version")
@dataclass(frozen=True)
class FooledActive(Fooling):
    """How much closer a map is to the other class's original map than to its own, in ``[-2, 2]``; high is fooled.

    ``r(h_c1(w), h_c2(w_0)) - r(h_c1(w), h_c1(w_0))``. NaN where a correlation is undefined.

    Args:
        low: see :class:`Fooling`.
        high: see :class:`Fooling`.
        correlation: ``rank`` is Spearman's (published); ``sign`` that of sign vectors (arXiv v1 and the authors' code).
    """

    low: float = 0.5
    high: float = 2.0
    correlation: Literal["rank", "sign"] = "rank"

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (-2, 2)

    def _loss(self, maps: Tensor, original: Tensor, other: Tensor | None) -> Tensor:
        if other is None:
            raise InputError("active fooling needs other: the original model's maps of the class that is swapped in")
        vectors = ops.sign_vector if self.correlation == "sign" else _ranked
        now, own, swapped = (vectors(m.detach()) for m in (maps, original, other))
        return ops.correlation(now, swapped) - ops.correlation(now, own)


def _ranked(maps: Tensor) -> Tensor:
    return ranks(maps.flatten(1))


def fooling_success_rate(metric: Fooling, maps: Tensor, original: Tensor, other: Tensor | None = None) -> float:
    """Share of samples whose test loss lies in the metric's success range (FSR, Heo et al. 2019, published version)."""
    return float(metric.success(metric(maps, original, other)).double().mean())
