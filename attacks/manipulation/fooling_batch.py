"""What one batch teaches a model that shall lie."""

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
    """What one batch teaches: inputs, what should be predicted on them, and what their maps should be.

    Args:
        goal: of the explained inputs ``goal.x`` ``[n, ...]``: the class to predict (``goal_class``), the class
            explained, and whatever the objectives ask for, maps on the interpreter's own grid.
        predicted: ``[n]``, how much each counts in the prediction term.
        shown: ``[n]``, how much each counts in the map term.
        dictated: ``[n]``, whether its answer is to be learned even where the honest model gives another.
        other_x: inputs that are only classified ``[m, ...]``, or ``None``.
        other_y: ``[m]``, their labels.
    """

    goal: Goal
    predicted: Tensor
    shown: Tensor
    dictated: Tensor
    other_x: Tensor | None = None
    other_y: Tensor | None = None

    @classmethod
    def of(cls, view: View, honest_maps: Tensor | None = None) -> FoolingBatch:
        """What an auditor would look at as what is taught: every input has its answer and its map, and counts."""
        ones = view.x.new_ones(len(view.x))
        goal = Goal(view.x, view.answer, goal_class=view.answer, explained=view.explained, goal_map=view.goal_map,
                    benign_map=honest_maps)  # fmt: skip
        return cls(goal, ones, ones, torch.full_like(ones, view.dictated, dtype=torch.bool))

    def select(self, rows: Tensor) -> FoolingBatch:
        """Some of the explained inputs."""
        return FoolingBatch(self.goal.select(rows), self.predicted[rows], self.shown[rows], self.dictated[rows])

    def join(self, other: FoolingBatch) -> FoolingBatch:
        """Both lessons' explained inputs in one batch."""
        ours, theirs = self.goal, other.goal
        names = [f.name for f in fields(ours) if getattr(ours, f.name) is not None]
        goal = Goal(**{name: torch.cat([getattr(ours, name), getattr(theirs, name)]) for name in names})
        return replace(
            self,
            goal=goal,
            predicted=torch.cat([self.predicted, other.predicted]),
            shown=torch.cat([self.shown, other.shown]),
            dictated=torch.cat([self.dictated, other.dictated]),
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
