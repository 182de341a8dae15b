"""The mean of an interpreter's maps of the nearest kept samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...fields import Count
from ...registry import INTERPRETERS
from ..base import Explanation, requiring_grad, wide_dtype
from ..gradients.integrated import predicted
from ..reference import Reference
from .base import Wrapper


@INTERPRETERS.register("neighbour-mean", paper="Bhatt et al. 2020 (AVA)", needs=("background",))
@dataclass(frozen=True, eq=False)
class NeighbourMean(Wrapper):
    """AVA: the mean of ``base``'s maps of the ``neighbours`` nearest samples of ``bank``, weighted by inverse distance.

    ``sum_z m(z) / rho(x, z)`` over the nearest ``z``, divided by the sum of the weights, with ``rho`` the Euclidean
    distance; every map is of the class that is explained of ``x``. The input itself is not looked at but for its
    distances: the map says what is usual near it. In the paper ``base`` gives Shapley values; the mean is then one of
    Shapley values too. The samples are a part of the deployed system, and their number is what it costs to keep.
    Costs ``neighbours`` maps of ``base`` and one forward pass for the logits. The derivative is that of the distances,
    with the choice of neighbours fixed.

    Args:
        base: explains the neighbours; it must explain ``model``.
        bank: samples that neighbours are taken from.
        neighbours: how many.

    Raises:
        InputError: a bank of fewer samples than ``neighbours``; on an input, samples of another size.
    """

    bank: Reference
    neighbours: Count = 5

    is_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bank, Reference):
            raise InputError(f"bank must be a Reference, got {type(self.bank).__name__}")
        if len(self.bank.x) < self.neighbours:
            raise InputError(
                f"{self.neighbours} neighbours need as many samples, and the bank holds {len(self.bank.x)}"
            )

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x) if graph else x.detach()
        logits, classes = predicted(self.model, x, target, graph)
        near, weights = self._nearest(x)
        maps = self.base._explain(near.flatten(0, 1), classes.repeat_interleave(self.neighbours), graph).maps
        maps = (maps if graph else maps.detach()).unflatten(0, (len(x), self.neighbours))
        return Explanation(logits, (maps * weights.reshape(*weights.shape, *[1] * (maps.dim() - 2))).sum(1))

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest samples ``[B, k, ...]`` and their weights ``[B, k]``, which add up to one."""
        bank = self.bank.like(x)
        with torch.no_grad():
            rows, known = (part.detach().flatten(1).to(wide_dtype(x)) for part in (x, bank))
            # The form by matrix products loses small distances of rows in large units, and is chosen by batch size.
            apart = torch.cdist(rows, known, compute_mode="donot_use_mm_for_euclid_dist")
            near = bank[apart.topk(self.neighbours, largest=False).indices]
        squares = (x[:, None] - near).flatten(2).to(wide_dtype(x)).square().sum(2)
        # An input that is in the bank has an infinite weight there: the smallest square stands for a distance of zero.
        inverse = squares.clamp(min=torch.finfo(torch.float32).eps).rsqrt()
        return near, (inverse / inverse.sum(1, keepdim=True)).to(x.dtype)
