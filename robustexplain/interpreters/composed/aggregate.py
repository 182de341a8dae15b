"""The mean of several interpreters' maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import maps as ops
from ...errors import InputError
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explain_together
from .base import Composed


@INTERPRETERS.register("aggregate", paper="Rieger and Hansen 2020 (AGG-Mean)")
@dataclass(frozen=True, eq=False)
class Aggregate(Composed):
    """The mean of the members' maps, each rescaled first, at the input's size.

    Args:
        members: interpreters of the same model.
        rescale: ``sum`` (each map's magnitudes sum to one, as AGG-Mean), ``minmax`` or ``absmax``.
    """

    members: tuple[Interpreter, ...] = ()
    rescale: ops.Rescale = "sum"

    unit_range: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if len(self.members) < 2:
            raise InputError(f"an aggregate needs two members or more, got {len(self.members)}")
        super().__post_init__()

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        maps, shared = explain_together(self.members, x, target, graph)
        resized = [ops.resize(m, x.shape[-2:]) if x.dim() == 4 else m for m in maps]
        # Maps that sum to one are scaled to a mean magnitude of one.
        size = resized[0][0].numel() if self.rescale == "sum" else 1
        scaled = [ops.rescale(m, self.rescale) * size for m in resized]
        return shared._replace(maps=torch.stack(scaled).mean(0))
