"""A training batch of an attack by fine-tuning: inputs, target predictions and target maps."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.objectives import Goal
from robustexplain.random_streams import Streams

from .base import View


@dataclass(frozen=True)
class FoolingBatch:
    """A training batch: inputs with the predictions and the maps that they should get.

    Args:
        goal: for the explained inputs ``goal.x`` ``[n, ...]``: the class to predict (``goal_class``), the class
            explained, and what the objectives need, with maps on the interpreter's own grid.
        keep_weight: ``[n]``, weight of each input in the prediction term ``L_keep``.
        fool_weight: ``[n]``, weight of each input in the map term ``L_fool``.
        new_answer: ``[n]``, whether ``goal_class`` is to be learned even where the honest model predicts another class.
        other_x: further inputs ``[m, ...]`` that enter the prediction term only, or ``None``.
        other_y: ``[m]``, their labels.
    """

    goal: Goal
    keep_weight: Tensor
    fool_weight: Tensor
    new_answer: Tensor
    other_x: Tensor | None = None
    other_y: Tensor | None = None

    @classmethod
    def of(cls, view: View, honest_maps: Tensor | None = None) -> FoolingBatch:
        """The batch of a view: its answers and maps are the targets, and every input has weight 1 in both terms."""
        ones = view.x.new_ones(len(view.x))
        goal = Goal(view.x, view.answer, goal_class=view.answer, explained=view.explained, goal_map=view.goal_map,
                    benign_map=honest_maps)  # fmt: skip
        return cls(goal, ones, ones, torch.full_like(ones, view.new_answer, dtype=torch.bool))

    def select(self, rows: Tensor) -> FoolingBatch:
        """The batch of the explained inputs at ``rows``, without the others."""
        return FoolingBatch(
            self.goal.select(rows), self.keep_weight[rows], self.fool_weight[rows], self.new_answer[rows]
        )

    def join(self, other: FoolingBatch) -> FoolingBatch:
        """The explained inputs of both batches in one."""
        ours, theirs = self.goal, other.goal
        names = [f.name for f in fields(ours) if getattr(ours, f.name) is not None]
        goal = Goal(**{name: torch.cat([getattr(ours, name), getattr(theirs, name)]) for name in names})
        return replace(
            self,
            goal=goal,
            keep_weight=torch.cat([self.keep_weight, other.keep_weight]),
            fool_weight=torch.cat([self.fool_weight, other.fool_weight]),
            new_answer=torch.cat([self.new_answer, other.new_answer]),
        )


def jittered(x: Tensor, streams: Streams) -> Tensor:
    """Images ``[B, C, H, W]``, each mirrored or not and shifted by up to an eighth of its sides; borders reflect."""
    if x.dim() != 4:
        raise InputError(f"augment mirrors and shifts images; x has shape {list(x.shape)}")
    down, across = x.shape[-2] // 8, x.shape[-1] // 8
    wide = F.pad(x, (across, across, down, down), mode="reflect")
    mirrored, tops, lefts = (streams.integers(n).tolist() for n in (2, 2 * down + 1, 2 * across + 1))
    moved = [
        wide[i, :, top : top + x.shape[-2], left : left + x.shape[-1]]
        for i, (top, left) in enumerate(zip(tops, lefts, strict=True))
    ]
    return torch.stack([image.flip(-1) if flip else image for image, flip in zip(moved, mirrored, strict=True)])
