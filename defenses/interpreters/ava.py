"""Explaining an input by the maps of the kept samples nearest to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from robustexplain.errors import InputError
from robustexplain.fields import Count
from robustexplain.interpreters import NeighbourMean, Reference
from robustexplain.interpreters.composed.base import walk
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import TrainedDefense, refuse
from .calibration import clean_inputs


@DEFENSES.register("ava", paper="Bhatt et al. 2020 (AVA)", needs=("data",))
@dataclass(frozen=True)
class AVA(TrainedDefense):
    """Replace the map by the mean of the maps of the nearest kept samples, weighted by inverse distance.

    No training: the defense's samples are kept in the system (:class:`robustexplain.interpreters.NeighbourMean`), and
    are deployed with it. A small change of the input moves the distances a little and the map hardly; it can hardly
    show, for the same reason, what is particular to the input. The cost is that of ``neighbours`` maps.

    Args:
        neighbours: how many samples are explained.
        images: how many of the defense's samples are kept; all of them if there are fewer.
    """

    neighbours: Count = 5
    images: Count = 512

    layer = "interpreter"
    wraps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours > self.images:
            raise InputError(f"AVA.neighbours must be at most images, {self.images}, got {self.neighbours}")

    @property
    def fewest(self) -> int:
        """As many as there are neighbours."""
        return self.neighbours

    def _train(self, system: System, data: Samples, session: Session) -> System:
        own = system.interpreter
        refuse(any(isinstance(part, NeighbourMean) for part in walk(own)), "it explains neighbours already")
        if len(data) < self.neighbours:
            raise InputError(f"AVA.neighbours is {self.neighbours}, and there are {len(data)} samples")
        bank = Reference(clean_inputs(system, data, self.images, self.seed))
        return replace(system, interpreter=NeighbourMean(system.model, own, bank, self.neighbours))
