"""Feature squeezing: an input whose prediction changes under squeezing is suspicious."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from robustexplain.door import answer
from robustexplain.objectives import EvadeSqueezing, Objective
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session
from robustexplain.transforms import Transform, transforms

from .base import Detector, DetectorDefense


@DETECTORS.register("feature-squeezing", paper="Xu et al. 2018, sections IV-V")
@dataclass(frozen=True, eq=False)
class FeatureSqueezingDetector(Detector):
    """The largest L1 distance of the probabilities on the input and on its squeezed versions, in ``[0, 2]``.

    Args:
        model: the deployed classifier.
        squeezers: transforms of the input.
    """

    model: nn.Module
    squeezers: tuple[Transform, ...]

    @property
    def random(self) -> bool:
        """Whether a squeezer uses random draws."""
        return any(s.random for s in self.squeezers)

    def redrawn(self, seed: int) -> Self:
        """With other random draws of its squeezers."""
        return replace(self, squeezers=tuple(s.redrawn(seed) for s in self.squeezers))

    def distances(self, x: Tensor, *, straight: bool = False, logits: Tensor | None = None) -> Tensor:
        """``[B, M]``: ``||f(x) - f(psi_i(x))||_1`` for each squeezer, ``f`` the probabilities.

        Args:
            x: images ``[B, C, H, W]`` in ``[0, 1]``.
            straight: straight-through gradients for rounding.
            logits: ``[B, K]`` of ``x``, if they are known.
        """
        p = (answer(self.model, x) if logits is None else logits).softmax(1)
        squeezed = ((s.straight(x) if straight else s(x)) for s in self.squeezers)
        return torch.stack([(p - answer(self.model, image).softmax(1)).abs().sum(1) for image in squeezed], 1)

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the largest distance."""
        known = seen is not None and seen.interpreter is not None and seen.interpreter.model is self.model
        return self.distances(x, logits=seen.logits if known else None).amax(1)  # type: ignore[union-attr]

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same value, with a gradient: straight-through for bit depth, exact for the filters."""
        return self.distances(x, straight=True).amax(1)

    def evasion(self, weight: float) -> Objective:
        """A hinge on the distance of each squeezer, with a way back where probabilities saturate.

        With random squeezers it is the hinge on the score: that of a system drawn again has that system's draws. Zhang
        et al. 2020 (section 4 Q3) minimise the cross-entropy between the predictions instead, which is never 0: a
        search would go on agreeing where the alarm is silent, and lose the map (``adaptive-squeezing`` has it).
        """
        if self.random:
            return super().evasion(weight)
        return weight * EvadeSqueezing(self.squeezers, (1.0,) * len(self.squeezers), self.threshold)

    @torch.no_grad()
    def reasons(self, x: Tensor) -> dict[str, Tensor]:
        """The distance for each squeezer."""
        return {s.name: d for s, d in zip(self.squeezers, self.distances(x).unbind(1), strict=True)}


@DEFENSES.register("feature-squeezing", paper="Xu et al. 2018", needs=("data",))
@dataclass(frozen=True)
class FeatureSqueezing(DetectorDefense):
    """Add a detector that compares the predictions on an input and on its squeezed versions.

    The default is the authors' choice for ImageNet; for CIFAR-10 they use ``nl-means-13-3-2`` as the last. By
    default the threshold is the largest of those for clean and for harmlessly changed samples of the defense; with
    ``harmless: null`` it is the paper's, for clean ones alone (5% false alarms). Nothing is trained.

    Args:
        squeezers: their names, as :func:`robustexplain.transforms.squeezing.squeezer` takes them.
    """

    squeezers: Sequence[str] = ("bit-depth-5", "median-2", "nl-means-11-3-4")

    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "squeezers", tuple(self.squeezers))
        transforms(self.squeezers)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        return FeatureSqueezingDetector(system.model, transforms(self.squeezers))
