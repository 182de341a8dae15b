"""Base class of the defenses that add a detector: split of the samples, calibration, several detectors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustexplain.data import stack
from robustexplain.door import suited
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, Fraction
from robustexplain.random_streams import generator
from robustexplain.system import System
from robustexplain.training import Samples, Session, frozen
from robustexplain.transforms import HarmlessChange, harmless_for

from ..base import TrainedDefense
from .any_of import AnyOf
from .detector import Detector, fingerprints

__all__ = ["Detector", "DetectorDefense"]


@dataclass(frozen=True)
class DetectorDefense(TrainedDefense):
    """Adds a detector, calibrated on clean samples; a system with a detector gets :class:`AnyOf` of both.

    A subclass implements ``_fit``. If it ``trains``, four fifths of the samples are for training and the rest for
    calibration.

    Args:
        samples: largest number of the defense's samples that are used.
        false_alarms: share of clean inputs that may raise the alarm, of all the system's detectors together; and of
            inputs after each of the harmless changes.
        harmless: what these are; empty: the usual ones of the kind of input (in a recipe: ``evaluation.harmless``);
            ``None``: calibrated on clean inputs alone, as in the papers.
        batch_size: inputs per forward pass, except in training.

    Raises:
        FieldError: fewer ``samples`` than it needs (:attr:`fewest`).
    """

    samples: Count = field(default=2048, kw_only=True)
    false_alarms: Fraction = field(default=0.05, kw_only=True)
    harmless: tuple[HarmlessChange, ...] | None = field(default=(), kw_only=True)
    batch_size: Count = field(default=32, kw_only=True)

    layer = "detector"
    trains: ClassVar[bool] = True
    """Whether ``_fit`` uses samples; otherwise all are used for calibration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < self.fewest:
            raise FieldError(type(self).__name__, "samples", f"must be at least {self.fewest}, got {self.samples}")

    @property
    def fewest(self) -> int:
        """Some dozens: 19 to calibrate on let an alarm be as rare as 5%, and one that trains calibrates on a fifth."""
        return 20

    @abstractmethod
    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        """The detector, not calibrated yet.

        Args:
            system: the system to be watched; its weights are frozen during the fit.
            x: ``[N, ...]`` to train on; ``[0, ...]`` where the defense does not train.
            y: ``[N]`` labels.
            session: accelerator, checkpoints, progress.
        """

    def _train(self, system: System, data: Samples, session: Session) -> System:
        x, y, clean = self._split(data)
        x, clean = suited(system.model, x), suited(system.model, clean)
        y = y.to(x.device)
        with frozen(system.model):
            detector = self._fit(system, x, y, session)
            if not isinstance(detector, Detector):
                raise InputError(f"{type(self).__name__}._fit must give a Detector, got {type(detector).__name__}")
            if len(x):
                detector = replace(detector, trained_on=fingerprints(x))
            changes = () if self.harmless is None else harmless_for(self.harmless, clean.shape[1:], clean.cpu())
            detector = detector.calibrated(clean, self.false_alarms, self.batch_size, changes)
            if system.detector is not None:
                both = AnyOf((system.detector, detector))
                detector = both.calibrated(clean, self.false_alarms, self.batch_size, changes)
        return replace(system, detector=detector)

    def _split(self, data: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and labels for training, and clean inputs for calibration."""
        size = min(len(data), self.samples)
        if size < self.fewest:
            raise InputError(f"{type(self).__name__} needs some dozens of samples to calibrate on, got {size}")
        draws = generator(self.seed, "split" if self.trains else "calibration")
        x, y = stack(data, torch.randperm(len(data), generator=draws)[:size].tolist())
        cut = size - max(size // 5, 1) if self.trains else 0
        return x[:cut], y[:cut], x[cut:]
