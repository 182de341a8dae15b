"""One map of several interpreters': their mean, the mean over their disagreement, or the mean of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ... import maps as ops
from ...autograd.straight_through import is_straight
from ...errors import FieldError, InputError
from ...fields import Positive
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explain_together
from .base import Composed

How = Literal["mean", "var", "rank"]
"""Mean of the members, mean over deviation (AGG-Var), mean of ranks (Borda)."""
NEAR = 64
"""The slope of a rank is measured over this share of the pixels, to either side."""


@INTERPRETERS.register("aggregate", paper="Rieger and Hansen 2020 (AGG-Mean, AGG-Var); Bhatt et al. 2020 (weights)")
@dataclass(frozen=True, eq=False)
class Aggregate(Composed):
    """The members' maps, each rescaled at the input's size, made one: ``mean``, ``var`` or ``rank``.

    ``mean`` is AGG-Mean, ``sum_j w_j m_j``. ``var`` is AGG-Var: the mean divided, pixel by pixel, by the deviation of
    the members plus a constant, so that pixels on which they agree count for more. ``rank`` is the mean of the ranks of
    the pixels in each map, as shares of the number of pixels (Borda's count); it is piecewise constant, and an attack
    that knows it follows the slope of the ranks (``rounds``).

    Args:
        members: interpreters of the same model.
        rescale: ``sum`` (each map's magnitudes over their sum, as AGG-Mean), ``minmax`` or ``absmax``.
        how: how the rescaled maps are made one.
        weights: of the members, not negative, adding up to one; empty: all the same.
        floor: of ``var``: the constant, as a share of the map's mean deviation. Small values let the few pixels on
            which all members agree by chance outweigh the rest.

    Raises:
        InputError: one member, weights that are no distribution over the members.
    """

    members: tuple[Interpreter, ...] = ()
    rescale: ops.Rescale = "sum"
    how: How = "mean"
    weights: tuple[float, ...] = ()
    floor: Positive = 1.0

    unit_range: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")
        check_weights(self, self.weights, len(self.members))
        super().__post_init__()

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        """Whether its derivative is zero because it counts ranks, or that of a member is."""
        return self.how == "rank" or super().rounds

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        maps, shared = explain_together(self.members, x, target, graph)
        resized = [ops.resize(m, x.shape[-2:]) if x.dim() == 4 else m for m in maps]
        return shared._replace(maps=self.combined(torch.stack([ops.rescale(m, self.rescale) for m in resized])))

    def combined(self, maps: Tensor) -> Tensor:
        """One map ``[B, ...]`` from the members' rescaled maps ``[M, B, ...]``."""
        if self.how == "rank":
            return self._mean(torch.stack([ranked(m) for m in maps]))
        # Maps that sum to one are scaled to a mean magnitude of one.
        maps = maps * (maps[0, 0].numel() if self.rescale == "sum" else 1)
        mean = self._mean(maps)
        if self.how == "mean":
            return mean
        deviation = _root(self._mean((maps - mean).square()))
        floor = self.floor * deviation.flatten(1).mean(1)
        return mean / (deviation + ops.expand(torch.where(floor > 0, floor, 1), mean))

    def _mean(self, maps: Tensor) -> Tensor:
        if not self.weights:
            return maps.mean(0)
        return (maps * ops.expand(maps.new_tensor(self.weights), maps)).sum(0)


def check_weights(component: object, weights: tuple[float, ...], members: int) -> None:
    """Refuse weights that are no distribution over the members; none at all stand for equal ones.

    Raises:
        FieldError: another number of weights, one that is negative or not finite, a sum other than one.
    """
    name = type(component).__name__
    if weights and len(weights) != members:
        raise FieldError(name, "weights", f"must hold a number for each of the {members} members, got {weights!r}")
    if any(isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 <= w <= 1 for w in weights) or (
        weights and not math.isclose(sum(weights), 1, abs_tol=1e-6)
    ):
        raise FieldError(name, "weights", f"must hold shares that add up to 1, got {weights!r}")


def ranked(maps: Tensor) -> Tensor:
    """Each pixel's rank in its map, ties by their average, as a share of the pixels: ``(0, 1]``, the shape of ``maps``.

    The derivative is zero; inside ``straight_through`` it is the slope of the rank as a function of the pixel's value
    with the others fixed, measured between neighbours in the order of values.
    """
    flat = ops.per_sample(maps)
    ordered, order = flat.detach().sort(dim=1, stable=True)
    found = torch.zeros_like(ordered).scatter(1, order, _places(ordered))
    # Attached: a map that carries no graph at all is taken for one that cannot be differentiated.
    slope = torch.zeros_like(found)
    if is_straight():
        slope = slope.scatter(1, order, _slopes(ordered))
    through = slope * flat
    return (found + (through - through.detach())).reshape(maps.shape)


def _places(ordered: Tensor) -> Tensor:
    """The places in sorted rows ``[B, N]`` as shares of ``N``; equal values share the mean of theirs."""
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = first.cumsum(1) - 1
    # In float64: whole numbers beyond 256 are none in bfloat16.
    places = torch.arange(1, ordered.shape[1] + 1, device=ordered.device, dtype=torch.float64).expand(ordered.shape)
    none = torch.zeros_like(places)
    means = none.scatter_add(1, group, places) / none.scatter_add(1, group, torch.ones_like(places)).clamp(min=1)
    return (means.gather(1, group) / ordered.shape[1]).to(ordered.dtype)


def _slopes(ordered: Tensor) -> Tensor:
    """How much of the order each value of sorted rows ``[B, N]`` passes for a unit of itself; 0 among equal ones."""
    size = ordered.shape[1]
    places = torch.arange(size, device=ordered.device)
    reach = max(1, size // NEAR)
    low, high = (places - reach).clamp(min=0), (places + reach).clamp(max=size - 1)
    gap = ordered[:, high] - ordered[:, low]
    share = (high - low).to(ordered.dtype) / size
    return torch.where(gap > 0, share / torch.where(gap > 0, gap, 1), 0)


def _root(squares: Tensor) -> Tensor:
    """The root, with a derivative of zero at zero instead of infinity."""
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)
