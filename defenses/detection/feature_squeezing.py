"""Feature squeezing: an input whose prediction changes where the image is squeezed is suspicious."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustexplain.data import stack
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction
from robustexplain.metrics import threshold_at
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import System
from robustexplain.training import Samples, Session
from robustexplain.transforms import Transform, transforms

from ..base import Defense


@DETECTORS.register("feature-squeezing", paper="Xu et al. 2018, sections IV-V")
@dataclass(frozen=True, eq=False)
class FeatureSqueezingDetector:
    """The largest L1 distance of the probabilities on the input and on its squeezed versions, in ``[0, 2]``.

    Args:
        model: the deployed classifier.
        squeezers: what the input is squeezed by.
        threshold: score above which there is an alarm.
        soft_threshold: the same for ``soft_score``.
    """

    model: nn.Module
    squeezers: tuple[Transform, ...]
    threshold: float = 1.0
    soft_threshold: float = 1.0

    def distances(self, x: Tensor, *, straight: bool = False) -> Tensor:
        """``[B, M]``: ``||f(x) - f(psi_i(x))||_1`` for each squeezer, ``f`` the probabilities.

        Args:
            x: images ``[B, C, H, W]`` in ``[0, 1]``.
            straight: go straight through rounding where gradients are wanted.
        """
        p = self.model(x).softmax(1)
        squeezed = ((s.straight(x) if straight else s(x)) for s in self.squeezers)
        return torch.stack([(p - self.model(image).softmax(1)).abs().sum(1) for image in squeezed], 1)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """``[B]``: the largest distance."""
        return self.distances(x).amax(1)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same value, with a gradient: straight through bit depth, that of the filters elsewhere."""
        return self.distances(x, straight=True).amax(1)


@DEFENSES.register("feature-squeezing", paper="Xu et al. 2018", needs=("data",))
@dataclass(frozen=True)
class FeatureSqueezing(Defense):
    """Add a detector that compares the predictions on an input and on its squeezed versions.

    The default is the authors' choice for ImageNet; for CIFAR-10 they take ``nl-means-13-3-2`` for the last. It is
    calibrated on the defense's samples, clean; nothing is trained.

    Args:
        squeezers: their names, as :func:`robustexplain.transforms.squeezing.squeezer` takes them.
        samples: use at most so many of the defense's samples.
        false_alarms: share of clean inputs that may raise the alarm (the paper: 5%).
        batch_size: of the calibration.
    """

    squeezers: Sequence[str] = ("bit-depth-5", "median-2", "nl-means-11-3-4")
    samples: Count = 2048
    false_alarms: Fraction = 0.05
    batch_size: Count = 32

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "squeezers", tuple(self.squeezers))
        transforms(self.squeezers)

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # refused at the door; for the type checker
        total: int = len(data)  # type: ignore[arg-type]
        if total < 20:
            raise InputError(f"feature squeezing needs some dozens of samples to calibrate on, got {total}")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(derive(self.seed, "calibration")))
        x = stack(data, order[: self.samples].tolist())[0].to(session.device)
        detector = FeatureSqueezingDetector(system.model, transforms(self.squeezers))
        with torch.no_grad():
            parts = [(detector.score(part), detector.soft_score(part)) for part in x.split(self.batch_size)]
        hard, soft = (torch.cat(scores) for scores in zip(*parts, strict=True))
        calibrated = replace(
            detector,
            threshold=threshold_at(hard, self.false_alarms),
            soft_threshold=threshold_at(soft, self.false_alarms),
        )
        return replace(system, detector=calibrated)
