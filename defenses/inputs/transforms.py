"""Transforms in front of the classifier: compression, squeezing, random resizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from robustexplain.interpreters import OfTransformed
from robustexplain.models import with_transforms
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session
from robustexplain.transforms import transform, transforms

from ..base import Defense, refuse
from .placed import placed


@DEFENSES.register("input-transform", paper="Guo et al. 2018; Xu et al. 2018; Xie et al. 2018")
@dataclass(frozen=True)
class InputTransform(Defense):
    """Transform every image before the classifier sees it; nothing is trained.

    The map can explain either of two images (Guo et al., Xu et al. and Xie et al. do not discuss maps): ``raw`` maps
    explain the input image, through the transform, with straight-through gradients for rounding; ``transformed`` maps
    explain the transformed image. A trained interpreter's own network sees the image that is explained, and keeps its
    weights.

    Args:
        transforms: their names in the order of application, such as ``jpeg-75``; ``seed`` seeds random ones.
        explained: which image the interpreter explains.
    """

    transforms: Sequence[str] = ("jpeg-75",)
    explained: Literal["raw", "transformed"] = "raw"

    layer: ClassVar[Literal["model", "input", "interpreter", "detector"]] = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "transforms", tuple(self.transforms))
        transforms(self.transforms)

    def oblivious_view(self, defended: System, root: System) -> System:
        """The system that an oblivious attacker assumes: without the transforms."""
        return root

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        present = [t.name for t in getattr(system.model, "transforms", ())]
        again = next((name for name in map(self._seeded, self.transforms) if name in present), None)
        refuse(again is not None, f"{again!r} stands in front of the classifier already")
        model = with_transforms(system.model, [self._seeded(name) for name in self.transforms])
        return placed(system, model, OfTransformed if self.explained == "transformed" else None)

    def _seeded(self, name: str) -> str:
        made = transform(name)
        return name if getattr(made, "seed", 0) or not self.seed else made.redrawn(self.seed).name
