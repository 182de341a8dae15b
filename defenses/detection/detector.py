"""Base class of the detectors."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from robustexplain import checks
from robustexplain.errors import InputError
from robustexplain.metrics import threshold_at
from robustexplain.objectives import Objective
from robustexplain.objectives.evasion import hinge_on
from robustexplain.system import Explained
from robustexplain.transforms import HarmlessChange, harmless_for


@dataclass(frozen=True, eq=False)
class Detector(ABC):
    """Scores how suspicious an input is; an alarm is a score above ``threshold``.

    A subclass is a registered frozen dataclass (``eq=False``) that implements ``score`` and ``soft_score``.

    Args:
        threshold: score above which there is an alarm.
        soft_threshold: the same for ``soft_score``.
        scores: ``[N]`` of the clean inputs that it was calibrated on; ``None``: not calibrated.
        soft_scores: ``[N]``, their soft scores.
        harmless_scores: ``[K, N]`` of these inputs after each of the harmless changes; ``None``: on clean ones alone.
        trained_on: :func:`fingerprints` of its training inputs, which calibration leaves out.
        calibrated_on: those of the clean inputs that it was calibrated on; its false alarms are counted on others.
    """

    threshold: float = field(default=1.0, kw_only=True)
    soft_threshold: float = field(default=1.0, kw_only=True)
    scores: Tensor | None = field(default=None, kw_only=True, repr=False)
    soft_scores: Tensor | None = field(default=None, kw_only=True, repr=False)
    harmless_scores: Tensor | None = field(default=None, kw_only=True, repr=False)
    trained_on: Tensor | None = field(default=None, kw_only=True, repr=False)
    calibrated_on: Tensor | None = field(default=None, kw_only=True, repr=False)

    @abstractmethod
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``, higher is more suspicious; no gradient is promised.

        Args:
            x: the inputs, ``[B, ...]``.
            seen: the system's logits and maps of the predicted classes for ``x``, if they are known; else computed
                again.
        """

    @abstractmethod
    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``, a differentiable surrogate of ``score``, for adaptive attacks."""

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The classifiers that it watches: its ``model``, if it has one."""
        model = getattr(self, "model", None)
        return () if model is None else (model,)

    @property
    def averaged(self) -> int:
        """Over how many random draws a score is averaged; 1 where nothing is random."""
        return 1

    def following(self, model: nn.Module, copy: nn.Module) -> Self:
        """The detector on ``copy``, which has the layers of ``model``, where its ``model`` is that; else itself.

        So a detector is drawn again with a model that uses random draws.
        """
        watching: dict[str, Any] = {"model": copy}
        return replace(self, **watching) if getattr(self, "model", None) is model else self

    def knows(self, x: Tensor) -> Tensor:
        """``[B]`` bool: inputs that it was trained or calibrated on."""
        known = [part.cpu() for part in (self.trained_on, self.calibrated_on) if part is not None]
        return torch.isin(fingerprints(x), torch.cat([torch.empty(0, dtype=torch.int64), *known])).to(x.device)

    def evasion(self, weight: float) -> Objective:
        """What an adversary who knows the detector adds to its loss: a hinge on the soft score, until no alarm rings.

        Args:
            weight: of the loss; no alarm is a constraint at any weight.
        """
        return weight * hinge_on(self)

    def reasons(self, x: Tensor) -> dict[str, Tensor]:
        """The figures behind an alarm by name, each ``[B]``."""
        return {"score": self.score(x)}

    def p_values(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]`` in ``(0, 1]``: how rarely a clean input is as suspicious (:func:`conformal_p_values`).

        Or an input after a harmless change, if that is less rare and the detector is calibrated on such inputs too.

        Raises:
            InputError: a detector that is not calibrated.
        """
        if self.scores is None:
            raise InputError(f"{type(self).__name__} is not calibrated: it keeps no scores of clean inputs")
        scores, harmless = self.score(x, seen)[:, None], self.harmless_scores
        kinds = [self.scores, *([] if harmless is None else harmless)]
        return torch.stack([conformal_p_values(scores, known[:, None])[:, 0] for known in kinds]).amax(0)

    def calibrated(
        self, x: Tensor, false_alarms: float, batch_size: int = 32, harmless: Sequence[HarmlessChange] = ()
    ) -> Self:
        """The detector with thresholds that a share ``false_alarms`` of new clean inputs exceeds (split conformal).

        With harmless changes, at most that share of clean inputs exceeds them, and of inputs after each of them; see
        :func:`robustexplain.metrics.threshold_at`.

        Args:
            x: clean inputs ``[N, ...]``; those that the detector was trained on are left out.
            false_alarms: in ``[0, 1]``.
            batch_size: inputs per forward pass.
            harmless: every input is scored after each of them too; none: clean inputs alone.

        Raises:
            InputError: the detector was trained on all of ``x``, or a score is NaN.
        """
        x = self._held_out(x)
        scores, soft_scores = self._scored(x, batch_size)
        made = replace(self._thresholds(scores, soft_scores, false_alarms), calibrated_on=fingerprints(x))
        return made._held_by(
            [self._thresholds(*self._scored(change(x), batch_size), false_alarms) for change in harmless]
        )

    def _held_by(self, others: Sequence[Self]) -> Self:
        """The detector with the largest thresholds of itself and of others, which were calibrated on changed inputs."""
        if not others:
            return self
        return replace(
            self,
            threshold=max(d.threshold for d in (self, *others)),
            soft_threshold=max(d.soft_threshold for d in (self, *others)),
            harmless_scores=torch.stack([d.scores for d in others if d.scores is not None]),
        )

    def _scored(self, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        scores, soft_scores = (in_batches(function, x, batch_size) for function in (self.score, self.soft_score))
        for what, found in (("score", scores), ("soft_score", soft_scores)):
            if found.shape != (len(x),):
                raise InputError(
                    f"{type(self).__name__}.{what} must give a number a sample, [{len(x)}], got {list(found.shape)}"
                )
        return scores, soft_scores

    def recalibrated(
        self,
        x: Tensor,
        false_alarms: float = 0.05,
        batch_size: int = 32,
        harmless: Sequence[HarmlessChange] | None = None,
    ) -> Self:
        """:meth:`calibrated` on clean inputs from where the detector is used, which are checked first.

        Args:
            x: clean inputs ``[N, ...]``.
            false_alarms: in ``[0, 1]``.
            batch_size: inputs per forward pass.
            harmless: changes that may reach it there; default those of the kind of input; ``()``: clean inputs alone.

        Raises:
            InputError: inputs that are neither images nor rows, or an error of :meth:`calibrated`.
        """
        checks.inputs(x)
        changes = harmless_for((), x.shape[1:], x) if harmless is None else tuple(harmless)
        return self.calibrated(x, false_alarms, batch_size, changes)

    def _thresholds(self, scores: Tensor, soft_scores: Tensor, false_alarms: float) -> Self:
        refuse_nan(scores, soft_scores)
        return replace(
            self,
            threshold=threshold_at(scores, false_alarms),
            soft_threshold=threshold_at(soft_scores, false_alarms),
            scores=scores.cpu(),
            soft_scores=soft_scores.cpu(),
            harmless_scores=None,
        )

    def _held_out(self, x: Tensor) -> Tensor:
        if self.trained_on is None or not len(x):
            return x
        kept = ~torch.isin(fingerprints(x), self.trained_on.cpu()).to(x.device)
        if not bool(kept.any()):
            raise InputError(f"the detector was trained on all {len(x)} inputs: calibrate it on others")
        return x[kept]


def conformal_p_values(scores: Tensor, clean: Tensor, *, of_others: bool = False) -> Tensor:
    """``(1 + #{i: clean_i >= score}) / (N + 1)`` for each of several scores (Vovk et al. 2005).

    Args:
        scores: ``[B, M]``.
        clean: ``[N, M]``, of inputs that no score was fitted to.
        of_others: ``scores`` are among ``clean``, and none is counted for itself.
    """
    above = (clean.to(scores.device)[None] >= scores[:, None]).sum(1) - int(of_others)
    return (1 + above).to(torch.float32) / (len(clean) + 1)


def fingerprints(x: Tensor) -> Tensor:
    """A 64-bit number for the content of each sample, int64 ``[B]`` on the CPU."""
    rows = np.ascontiguousarray(x.detach().to("cpu", torch.float32).flatten(1).numpy())
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(h, "big", signed=True) for h in hashes], dtype=torch.int64)


def refuse_nan(*scores: Tensor) -> None:
    """Refuse scores of clean inputs with a NaN, which give no threshold.

    Raises:
        InputError: any score is NaN; says how many.
    """
    for values in scores:
        count = int(values.isnan().sum())
        if count:
            raise InputError(f"{count} of {values.numel()} scores of clean inputs are NaN: nothing can be calibrated")


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """``function`` over batches of ``size``, concatenated; without gradients."""
    return torch.cat([function(part) for part in x.split(size)])
