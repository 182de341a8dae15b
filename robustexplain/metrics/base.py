"""The contract of map metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import InputError
from ..fields import check_fields


@dataclass(frozen=True)
class MapMetric(ABC):
    """Compares maps with reference maps, a number per sample: ``metric(maps, reference)`` gives ``[B]``."""

    higher_is_closer: ClassVar[bool]
    """Whether a larger value means that the maps resemble each other more."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, maps: Tensor, reference: Tensor) -> Tensor:
        """``[B]`` from two batches of maps ``[B, H, W]``.

        Raises:
            InputError: if the shapes differ.
        """
        if maps.shape != reference.shape or maps.dim() != 3:
            raise InputError(f"maps must be two equal [B, H, W], got {list(maps.shape)} and {list(reference.shape)}")
        return self._compare(maps, reference)

    @abstractmethod
    def _compare(self, maps: Tensor, reference: Tensor) -> Tensor:
        """``[B]``; shapes are checked."""
