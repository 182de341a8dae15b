"""What a metric may look at when a cell of the matrix is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..system import Explained, System


@dataclass(frozen=True, eq=False)
class Cell:
    """A batch of attacked inputs, and what the judged system says of them.

    Args:
        system: what is judged.
        clean: benign inputs ``[B, C, H, W]``.
        attacked: attacked inputs, of the same shape.
        benign: what the system says of the benign inputs.
        seen: what it says of the attacked ones, maps of the class that it predicts on them.
        references: other maps ``[B, H, W]`` that those of the attacked inputs are held against, by name: ``goal`` is
            the map that the adversary asked for, ``honest`` that of the system before it was manipulated.
    """

    system: System
    clean: Tensor
    attacked: Tensor
    benign: Explained
    seen: Explained
    references: Mapping[str, Tensor] = field(default_factory=dict)
