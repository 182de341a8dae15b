"""LENS: agreement of top pixels that forgives shifts by a pixel or two (Kamath et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import maps as ops
from ..checks import Kind
from ..errors import FieldError
from ..fields import Count, Positive, check_k
from ..registry import METRICS
from .base import MapMetric


@METRICS.register("lens", paper="Kamath et al. 2024 (arXiv:2312.10534, w-LENS-recall@k, w-LENS-prec@k, top-k-div)")
@dataclass(frozen=True)
class LENS(MapMetric):
    """Share of top pixels that lie within a window around the other map's, in ``[0, 1]``; 1 is all of them.

    A window of 1 is ``top-k``. Tied pixels share the places left, as there. Departures from the authors' code: a
    window ends at the image's border (theirs goes on in the next row), the first pixel takes part, and ``diverse``
    keeps the second pick.

    Args:
        k: a count from 1 on, a share of the pixels below 1 (the paper: 1000 of 128 x 128 on Flower, 100 on MNIST).
        window: side of the square window, odd (the paper: 3, 5, 7).
        of: ``recall``: top pixels of the map that lie near those of the reference; ``precision``: the other way round.
        diverse: choose the pixels one after the other, each removing its window from the choice; of equal pixels the
            first in reading order. There may be fewer than ``k``.
        magnitude: importance is the magnitude; ``False`` takes signed values.
    """

    k: Positive = 0.1
    window: Count = 3
    of: Literal["recall", "precision"] = "recall"
    diverse: bool = False
    magnitude: bool = True

    higher_is_closer: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0, 1)
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self, self.k)
        if self.window % 2 == 0:
            raise FieldError(type(self).__name__, "window", f"must be odd, got {self.window}")

    @torch.no_grad()
    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        chosen, near = maps, reference
        if self.of == "precision":
            chosen, near = near, chosen
        picked = self._top(chosen)
        shared = torch.minimum(picked, self._grown(self._top(near))).sum((1, 2))
        # Shares of tied places can exceed the number of picks by rounding.
        return (shared / picked.sum((1, 2))).clamp(max=1)

    def _top(self, maps: Tensor) -> Tensor:
        """Membership ``[B, H, W]`` of the top pixels."""
        k = ops.top_k_count(self.k, maps[0].numel())
        values = maps.abs() if self.magnitude else maps
        return self._spread(values, k) if self.diverse else ops.top_k(values, k).reshape(maps.shape)

    def _spread(self, values: Tensor, k: int) -> Tensor:
        left, picked = values.flatten(1).clone(), torch.zeros_like(values).flatten(1)
        rows = torch.arange(len(values), device=values.device)
        for _ in range(k):
            best = left.argmax(1)
            found = left[rows, best] > -torch.inf
            if not found.any():
                break
            new = torch.zeros_like(left)
            new[rows[found], best[found]] = 1
            picked += new
            left = left.masked_fill(self._grown(new.reshape(values.shape)).flatten(1) > 0, -torch.inf)
        return picked.reshape(values.shape)

    def _grown(self, members: Tensor) -> Tensor:
        grown: Tensor = F.max_pool2d(members[:, None], self.window, 1, self.window // 2)[:, 0]
        return grown
