"""Objectives on a flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..registry import OBJECTIVES
from .base import Goal, Objective, Observation

EPSILON = 1e-8
"""Under the root of :class:`FlowLoss`, in squared pixels."""

_AXES = ((0, 1), (2, 1), (1, 0), (1, 2))
_DIAGONALS = ((0, 0), (0, 2), (2, 0), (2, 2))


@OBJECTIVES.register("flow-loss", paper="Xiao et al. 2018, eq. 4; Zhang et al. 2020, A4")
@dataclass(frozen=True)
class FlowLoss(Objective):
    """How unevenly neighbouring pixels are moved: zero for a shift of the whole image.

    ``sum_i sum_{j in N(i)} sqrt((du_i - du_j)^2 + (dv_i - dv_j)^2) / N`` over the pixels ``i`` of a flow in pixels.
    Departure: the papers do not divide by the number ``N`` of pixels; Zhang et al.'s ``tau = 0.0005`` at 224 x 224 is
    25.1 here. The root has no derivative where two neighbours move together, so ``1e-8`` is added under it, as in the
    code of Zhang et al., and its root subtracted, so that a constant flow has loss 0.

    Args:
        neighbours: ``axes``, the four of the papers; ``diagonals``, the four of the code (for a chessboard of flows the
            loss is then 0). At the border the flow is replicated.
    """

    neighbours: Literal["axes", "diagonals"] = "axes"

    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """Mean over pixels of the summed distances to the four neighbours, in pixels."""
        flow = seen.variable
        if flow is None or flow.dim() != 4 or flow.shape[1] != 2:
            found = None if flow is None else list(flow.shape)
            raise InputError(f"FlowLoss needs a flow [B, 2, H, W], as the threat model Flow has, got {found}")
        height, width = flow.shape[-2:]
        padded = F.pad(flow, (1, 1, 1, 1), mode="replicate")
        total, floor = flow.new_zeros(len(flow)), flow.new_tensor(EPSILON).sqrt()
        for row, column in _AXES if self.neighbours == "axes" else _DIAGONALS:
            beside = padded[:, :, row : row + height, column : column + width]
            distance = ((flow - beside).square().sum(1) + EPSILON).sqrt() - floor
            total = total + distance.flatten(1).mean(1)
        return total
