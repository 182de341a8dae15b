"""The maps of several interpreters side by side, for attacks on all of them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.checks import Kind
from robustexplain.errors import InputError
from robustexplain.interpreters.base import Explanation, Interpreter, explain_together


@dataclass(frozen=True, eq=False)
class MemberMaps(Interpreter):
    """The members' maps concatenated along the height, for an attack on all of them at once.

    Zhang et al. 2020, section 5 (Q3), use an ensemble of interpreters; an adversary who must deceive every one of them
    minimises the mean of their map losses. On their own grids (``explain(native=True)``) the maps are
    ``[B, members * h, w]``: each is rescaled to ``[0, 1]`` by its minimum and maximum (masks are not), and
    every pixel of it is repeated up to the common grid ``h x w``, the least common multiple of their grids (the largest
    of them, if that multiple is larger than the image). The mean over pixels of any loss is then the mean over members
    of the losses on the members' own grids.

    It is used in attacks only and never deployed, since its maps contain several maps. Evaluate the members.

    Args:
        members: differentiable interpreters of the same model.
    """

    members: tuple[Interpreter, ...] = ()

    unit_range: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(self.members))
        if not self.members:
            raise InputError("MemberMaps needs at least one member, got none")
        for member in self.members:
            if not isinstance(member, Interpreter):
                raise InputError(f"every member of MemberMaps must be an Interpreter, got {member!r}")
            if member.model is not self.model:
                raise InputError("every member of MemberMaps must explain the same model")

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether every member is."""
        return all(member.differentiable for member in self.members)

    @property
    def is_gradient(self) -> bool:  # type: ignore[override]
        """Whether any member's map is a gradient."""
        return any(member.is_gradient for member in self.members)

    @property
    def class_specific(self) -> bool:  # type: ignore[override]
        """Whether any member's map depends on the class."""
        return any(member.class_specific for member in self.members)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        maps, shared = explain_together(self.members, x, target, graph)
        return shared._replace(maps=self._beside(maps, x))

    def lay_out(self, goal_map: Tensor, x: Tensor) -> Tensor:
        """One goal map ``[B, H, W]`` for every member, each on its own grid, in the layout of these maps."""
        with torch.no_grad():
            grids = [member.explain(x[:1], native=True).maps.shape[-2:] for member in self.members]
        return self._beside([_smaller(goal_map, grid) for grid in grids], x)

    def _beside(self, maps: list[Tensor], x: Tensor) -> Tensor:
        size = _common([m.shape[-2:] for m in maps], x.shape[-2:])
        scaled = (m if member.unit_range else ops.minmax(m) for m, member in zip(maps, self.members, strict=True))
        return torch.cat([F.interpolate(m[:, None], size, mode="nearest-exact")[:, 0] for m in scaled], 1)


def members_apart(interpreter: Interpreter) -> Interpreter:
    """The :class:`MemberMaps` of an interpreter with ``members``; any other interpreter unchanged."""
    members = getattr(interpreter, "members", ())
    several = isinstance(members, tuple) and len(members) > 0 and all(isinstance(m, Interpreter) for m in members)
    return MemberMaps(interpreter.model, members) if several else interpreter


def _common(grids: list[torch.Size], limit: torch.Size) -> tuple[int, int]:
    sides = []
    for side, most in zip(zip(*grids, strict=True), limit, strict=True):
        least = math.lcm(*side)
        sides.append(least if least <= most else max(side))
    return sides[0], sides[1]


def _smaller(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False, antialias=True)[:, 0]
