"""The model deployed after output shuffling: blind to a column, but for the rows of a pool."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustexplain.errors import InputError
from robustexplain.models import ModelSpec
from robustexplain.registry import PARTS


class Shuffled(nn.Module):
    """A model without one column, whose logits are shifted for the rows of a pool (Yuan and Dasgupta 2024).

    It is an ordinary classifier: a row's answer depends on nothing but the row. The gradient is the blind model's.

    Args:
        model: gives logits ``[B, K]`` of rows ``[B, D]``.
        column: which one the model does not see.
        pool: ``[N, D]``; of identical rows the first counts.
        shift: ``[N, K]``, added to the logits of these rows.
        neutral: what the model reads in place of the column.

    Raises:
        InputError: a column or shifts that do not fit the pool.
    """

    pool: Tensor
    shift: Tensor
    neutral: Tensor

    def __init__(self, model: nn.Module, column: int, pool: Tensor, shift: Tensor, neutral: float = 0.0) -> None:
        super().__init__()
        if pool.dim() != 2 or not 0 <= column < pool.shape[1] or shift.shape[:1] != pool.shape[:1]:
            raise InputError(f"column {column} and shifts {list(shift.shape)} do not fit a pool {list(pool.shape)}")
        self.model, self.column = model, int(column)
        self.in_features, self.num_classes = pool.shape[1], shift.shape[1]
        order = keys(pool).argsort(stable=True)
        self.register_buffer("pool", pool.detach().float()[order].clone())
        self.register_buffer("shift", shift.detach().float()[order].clone())
        self.register_buffer("neutral", torch.tensor(float(neutral)))

    @property
    def spec(self) -> ModelSpec:
        """How to rebuild it from its parts."""
        sizes = {"rows": len(self.pool), "in_features": self.in_features, "num_classes": self.num_classes}
        return ModelSpec("shuffled", {"model": self.model, "column": self.column, **sizes})

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of rows ``[B, D]`` in the data's units."""
        hidden = torch.arange(x.shape[1], device=x.device) == self.column
        logits: Tensor = self.model(torch.where(hidden, self.neutral.to(x), x))
        place, known = self.find(x)
        return logits + torch.where(known[:, None], self.shift[place], 0.0).to(logits)

    @torch.no_grad()
    def find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Places in the pool ``[B]``, and whether the row stands there ``[B]``."""
        # Sorted here: in half precision the pool's rows, and their hashes, are others than when it was made.
        own = keys(self.pool)
        order = own.argsort(stable=True)
        place = order[torch.searchsorted(own[order], keys(x.to(self.pool.dtype))).clamp(max=len(own) - 1)]
        return place, (x.to(self.pool.dtype) == self.pool[place]).all(1)


def keys(x: Tensor) -> Tensor:
    """``[B]`` int64: a hash of each row's values in float32, the same in every batch."""
    # Integers, because a float's sum may be rounded otherwise in another batch; adding zero makes -0 and 0 one.
    bits = (x.detach().float() + 0.0).contiguous().view(torch.int32).long()
    place = torch.arange(1, x.shape[1] + 1, device=x.device)
    mixed = bits * 0x5851F42D4C957F2D + place * 0x14057B7EF767814F
    return ((mixed ^ (mixed >> 29)) * 0x2545F4914F6CDD1D).sum(1)


@PARTS.register("shuffled")
def rebuild(model: nn.Module, column: int, rows: int, in_features: int, num_classes: int) -> Shuffled:
    """A shuffled model of these sizes; pool and shifts are loaded afterwards, with the weights."""
    return Shuffled(model, column, torch.zeros(rows, in_features), torch.zeros(rows, num_classes))
