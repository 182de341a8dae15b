"""What is proved of a map, beside the map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import maps as ops

ABSTAIN = -1
"""The value in :attr:`Certificate.decided` of a cell of which nothing is proved."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """What holds of a batch's maps for every input within ``radius`` of its own, whoever chose it.

    The statements are about the map that infinitely many draws of the noise would give. They rest on draws that are
    independent of the input: an adversary who knows the seed of the noise can choose an input on which they mislead.

    Args:
        radius: L2, in units of ``[0, 1]`` pixels; 0: of the input itself under the noise, and of no other input.
        alpha: the largest chance that any statement about an input is wrong; with ``each_pixel``, about a pixel.
        scores: ``[B, h, w]`` on the grid that was tested: the share of noisy copies that mark each cell.
        decided: int8 ``[B, h, w]``: 1 where a cell is certified as important, 0 as unimportant, -1 where neither is.
        overlap: ``[B]``: of the ``top`` cells of largest score, at least this share stays.
        top: how many cells ``overlap`` is about.
        each_pixel: whether ``alpha`` is for each cell on its own.
        same_class: whether it holds only for those inputs within ``radius`` of which the same class is explained.
    """

    radius: float
    alpha: float
    scores: Tensor
    decided: Tensor | None = None
    overlap: Tensor | None = None
    top: int = 0
    each_pixel: bool = False
    same_class: bool = False

    norm: ClassVar[str] = "l2"

    @property
    def one(self) -> Tensor | None:
        """Bool ``[B, h, w]``: certified as important."""
        return None if self.decided is None else self.decided == 1

    @property
    def zero(self) -> Tensor | None:
        """Bool ``[B, h, w]``: certified as unimportant."""
        return None if self.decided is None else self.decided == 0

    @property
    def abstain(self) -> Tensor | None:
        """Bool ``[B, h, w]``: nothing is proved."""
        return None if self.decided is None else self.decided == ABSTAIN

    def shares(self) -> dict[str, Tensor]:
        """``[B]`` each: ``certified_one``, ``certified_zero``, ``certified_overlap`` (those it has), the radius."""
        found = {"certified_radius": torch.full((len(self.scores),), self.radius)}
        if self.decided is not None:
            flat = self.decided.flatten(1)
            found |= {"certified_one": (flat == 1).float().mean(1), "certified_zero": (flat == 0).float().mean(1)}
        return found if self.overlap is None else {**found, "certified_overlap": self.overlap.float()}

    def contradicted(self, other: Certificate) -> Tensor:
        """``[B]``: share of cells that one certificate has as important and the other as unimportant.

        For two inputs within ``radius`` of each other it is 0, but for the chance ``alpha`` of each.
        """
        if self.decided is None or other.decided is None:
            return torch.zeros(len(self.scores))
        return ((self.decided + other.decided == 1) & (self.decided * other.decided == 0)).flatten(1).float().mean(1)

    def overlap_with(self, other: Certificate) -> Tensor:
        """``[B]``: share of the ``top`` cells of largest score that both have; ties share the last places."""
        mine, theirs = (ops.top_k(c.scores.double(), self.top) for c in (self, other))
        return torch.minimum(mine, theirs).sum(1) / self.top

    def detach(self) -> Certificate:
        """Itself: its tensors carry no gradient."""
        return self
