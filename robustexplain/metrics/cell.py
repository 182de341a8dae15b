"""The data that a metric can use in a cell of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..system import Explained, System


@dataclass(frozen=True, eq=False)
class Cell:
    """A batch of attacked inputs and the results of the evaluated system.

    Args:
        system: the system that is evaluated.
        clean: benign inputs ``[B, C, H, W]``.
        attacked: attacked inputs, of the same shape.
        benign: the system's results for the benign inputs.
        seen: its results for the attacked inputs, with maps of the predicted class.
        references: other maps ``[B, H, W]`` to compare those of the attacked inputs with, by name: ``goal`` is
            the map that the adversary asked for, ``honest`` that of the system before it was manipulated.
    """

    system: System
    clean: Tensor
    attacked: Tensor
    benign: Explained
    seen: Explained
    references: Mapping[str, Tensor] = field(default_factory=dict)
