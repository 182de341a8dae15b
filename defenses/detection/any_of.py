"""Several detectors of one system, with one joint false-alarm rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from robustexplain import system as systems
from robustexplain.errors import FewScoresWarning, InputError
from robustexplain.objectives import Goal, Objective, Observation, Sum
from robustexplain.objectives.evasion import evade
from robustexplain.registry import DETECTORS
from robustexplain.system import Explained
from robustexplain.transforms import HarmlessChange

from .detector import Detector, conformal_p_values, fingerprints, in_batches, refuse_nan


@DETECTORS.register("any-of", paper="Vovk et al. 2005 (conformal p-values); Tippett 1931 (the smallest)")
@dataclass(frozen=True, eq=False)
class AnyOf(Detector):
    """Raises an alarm where any of several detectors does, at one joint false-alarm rate.

    ``score = 1 - min_j p_j``, with the conformal p-values ``p_j`` of the detectors' scores among those of the clean
    inputs on which all of them were calibrated. The smallest of several p-values is small more often than each of them,
    so the threshold is calibrated on the joint score. ``soft_score`` is the largest of the soft scores, each
    standardised by its mean and standard deviation on those inputs. Make one by
    ``AnyOf((one, other)).calibrated(x, false_alarms)``.

    Args:
        detectors: two or more; an ``AnyOf`` among them is replaced by its detectors.
        clean: ``[N, M]``, each detector's scores of the inputs that it was calibrated on: clean ones, and these after
            harmless changes.
        soft_clean: ``[N, M]``, their soft scores.
    """

    detectors: tuple[systems.Detector, ...]
    clean: Tensor | None = field(default=None, kw_only=True, repr=False)
    soft_clean: Tensor | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "detectors", tuple(_flat(self.detectors)))
        if len(self.detectors) < 2:
            raise InputError(f"AnyOf needs two detectors or more, got {len(self.detectors)}")
        for detector in self.detectors:
            if not isinstance(detector, systems.Detector):
                raise InputError(f"expected a detector with threshold, score and soft_score, got {detector!r}")
        known = [t for d in self.detectors if (t := getattr(d, "trained_on", None)) is not None]
        object.__setattr__(self, "trained_on", torch.cat([t.cpu() for t in known]) if known else None)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The classifiers that any of them watches."""
        return tuple(model for detector in self.detectors for model in systems.watched(detector))

    @property
    def random(self) -> bool:
        """Whether any of them uses random draws."""
        return any(map(systems.draws, self.detectors))

    @property
    def averaged(self) -> int:
        """The fewest of those that use random draws."""
        return min((int(getattr(d, "averaged", 1)) for d in self.detectors if systems.draws(d)), default=1)

    @property
    def rounds(self) -> bool:
        """Whether any of them rounds, so that the derivative of its soft score is zero."""
        return any(getattr(detector, "rounds", False) is True for detector in self.detectors)

    def redrawn(self, seed: int) -> Self:
        """With other random draws of those that use some."""
        return replace(self, detectors=tuple(systems.redrawn(detector, seed) for detector in self.detectors))

    def knows(self, x: Tensor) -> Tensor:
        """``[B]`` bool: inputs that any of them was made with, or that all were calibrated on together."""
        return torch.stack([super().knows(x), *(systems.knows(detector, x) for detector in self.detectors)]).any(0)

    def following(self, model: nn.Module, copy: nn.Module) -> Self:
        """Each detector on ``copy``, where it can."""
        return replace(self, detectors=tuple(systems.following(d, model, copy) for d in self.detectors))

    @torch.no_grad()
    def member_p_values(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B, M]``: each detector's conformal p-value.

        Raises:
            InputError: not calibrated.
        """
        scores = torch.stack([systems.scored(detector, x, seen) for detector in self.detectors], 1)
        return conformal_p_values(scores, self._reference[0])

    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]`` in ``[0, 1)``: one minus the smallest p-value."""
        return 1 - self.member_p_values(x, seen).amin(1)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the largest standardised soft score."""
        return self._largest_standardised(torch.stack([detector.soft_score(x) for detector in self.detectors], 1))

    def evasion(self, weight: float) -> Objective:
        """The sum of the detectors' evasions, at the thresholds at which each raises the joint alarm."""
        members = enumerate(self.at_joint_alarm())
        parts = ((w, i, d, part) for i, d in members for w, part in evade(d, weight).terms())
        return Sum(tuple((w, OfMember(i, d, part) if "score" in part.needs else part) for w, i, d, part in parts))

    def at_joint_alarm(self) -> tuple[systems.Detector, ...]:
        """The detectors, each with the thresholds above which it raises the joint alarm by itself."""
        clean, soft_clean = self._reference
        # An alarm is 1 - p > threshold, p = (1 + r) / (N + 1), r the clean scores that are as high or higher.
        rank = max(round((1 - self.threshold) * (len(clean) + 1)) - 2, 0)
        hard, soft = (values.sort(0, descending=True).values[rank].tolist() for values in (clean, soft_clean))
        each = zip(self.detectors, hard, soft, soft_clean.cpu().unbind(1), strict=True)
        return tuple(_at(*one) for one in each)

    def reasons(self, x: Tensor) -> dict[str, Tensor]:
        """Each detector's p-value, and its own figures where it gives some, under its name."""
        found: dict[str, Tensor] = {}
        for name, detector, p in zip(self._names(), self.detectors, self.member_p_values(x).unbind(1), strict=True):
            found[f"{name}: p-value"] = p
            figures = detector.reasons(x) if isinstance(detector, Detector) else {}
            found |= {f"{name}: {key}": value for key, value in figures.items()}
        return found

    def calibrated(
        self, x: Tensor, false_alarms: float, batch_size: int = 32, harmless: Sequence[HarmlessChange] = ()
    ) -> Self:
        """The detectors calibrated jointly: a share ``false_alarms`` of clean inputs raises an alarm of any of them.

        With harmless changes, at most that share of clean inputs does, and of inputs after each of them.

        Raises:
            InputError: a detector was trained on all of ``x``, or a score is NaN.
        """
        held = self._held_out(x)
        size, x = len(held), torch.cat([held, *(change(held) for change in harmless)])
        clean = torch.stack([in_batches(detector.score, x, batch_size) for detector in self.detectors], 1)
        soft = torch.stack([in_batches(detector.soft_score, x, batch_size) for detector in self.detectors], 1)
        refuse_nan(clean, soft)
        calibrated = replace(self, clean=clean.cpu(), soft_clean=soft.cpu(), calibrated_on=fingerprints(held))
        # An input is not among those that it is compared with: a new one is not either.
        joint = (1 - conformal_p_values(clean, clean, of_others=True).amin(1)).split(size)
        soft_joint = calibrated._largest_standardised(soft).split(size)
        first, *others = (calibrated._thresholds(*parts, false_alarms) for parts in zip(joint, soft_joint, strict=True))
        made = first._held_by(others)
        return replace(made, threshold=min(made.threshold, self._highest(len(clean), size, false_alarms)))

    def _highest(self, count: int, clean: int, false_alarms: float) -> float:
        """The threshold that a new input exceeds whose score by any detector exceeds all ``count`` known ones."""
        if 0 < false_alarms * clean < len(self.detectors):
            warnings.warn(
                f"a joint alarm of {len(self.detectors)} detectors at {false_alarms:.2%} false alarms is calibrated on "
                f"{clean} clean inputs; it takes {math.ceil(len(self.detectors) / false_alarms)} for the highest score "
                "of each to be such a share",
                FewScoresWarning,
                stacklevel=3,
            )
        return float(1 - torch.tensor(2.0) / (count + 1))

    @property
    def _reference(self) -> tuple[Tensor, Tensor]:
        if self.clean is None or self.soft_clean is None:
            raise InputError("AnyOf is not calibrated: AnyOf(detectors).calibrated(x, false_alarms)")
        return self.clean, self.soft_clean

    def _largest_standardised(self, soft: Tensor) -> Tensor:
        clean = self._reference[1].to(soft)
        spread = clean.std(0, correction=0).clamp_min(torch.finfo(clean.dtype).tiny ** 0.5)
        return ((soft - clean.mean(0)) / spread).amax(1)

    def _names(self) -> list[str]:
        kinds = {entry.build: entry.name for entry in DETECTORS}
        names = [kinds.get(type(d), type(d).__name__) for d in self.detectors]
        return [
            f"{name} {names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]


@dataclass(frozen=True)
class OfMember(Objective):
    """An objective on the soft score of one detector among several.

    Args:
        index: of the detector among those of the system, which gives the soft score: drawn again, if the system is.
        detector: gives it where the system has no such detector.
        part: the objective.
    """

    index: int
    detector: systems.Detector
    part: Objective

    needs: ClassVar[frozenset[str]] = frozenset({"one detector's score"})

    @property
    def constraint(self) -> bool:  # type: ignore[override]
        """Whether ``part`` is one."""
        return self.part.constraint

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        """``part``'s loss, ``[B]``."""
        return self.part.loss(self._scored(seen), goal)

    def met(self, seen: Observation, goal: Goal) -> Tensor:
        """Where ``part`` is met, ``[B]``."""
        return self.part.met(self._scored(seen), goal)

    def _scored(self, seen: Observation) -> Observation:
        detector = self._of(seen)
        known: Tensor | None = seen.noted.get(detector)
        if known is None or (torch.is_grad_enabled() and not known.requires_grad):
            known = seen.noted[detector] = detector.soft_score(seen.x)
        alone = None if seen.system is None else replace(seen.system, detector=detector)
        return replace(seen, score=known, system=alone)

    def _of(self, seen: Observation) -> systems.Detector:
        several = None if seen.system is None else seen.system.detector
        members = several.detectors[self.index : self.index + 1] if isinstance(several, AnyOf) else ()
        return members[0] if members and type(members[0]) is type(self.detector) else self.detector


def _flat(detectors: tuple[systems.Detector, ...]) -> Iterator[systems.Detector]:
    for detector in detectors:
        yield from detector.detectors if isinstance(detector, AnyOf) else (detector,)


def _at(detector: Any, threshold: float, soft_threshold: float, soft_scores: Tensor) -> Any:
    """The detector with these thresholds and soft scores of clean inputs; unchanged if it has no such fields."""
    known = {f.name for f in fields(detector) if f.init} if is_dataclass(detector) else set()
    if not {"threshold", "soft_threshold"} <= known:
        return detector
    scores: dict[str, Any] = {"soft_scores": soft_scores} if "soft_scores" in known else {}
    return replace(detector, threshold=threshold, soft_threshold=soft_threshold, **scores)
