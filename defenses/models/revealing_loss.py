"""The loss of revealing training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.door import answer
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.random_streams import derive
from robustexplain.training import TrainingStep
from robustexplain.transforms import HarmlessChange, one_of

from .forger import Forger, apart

if TYPE_CHECKING:
    from .revealing import Revealing


@dataclass(frozen=True)
class RevealingLoss:
    """``task + keep * kept - weight * jump + harmless_weight * drift`` of each sample, ``[b]``.

    Args:
        settings: the defense.
        forger: the attacks in training, and what they attack.
        honest: the classifier as it was.
        changes: harmless ones.
    """

    settings: Revealing
    forger: Forger
    honest: nn.Module
    changes: tuple[HarmlessChange, ...]

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the module, perhaps wrapped for data-parallel training."""
        settings = self.settings
        forged, goal = self.forged(x, y, step)
        harmless = one_of(self.changes, x, derive(step.seed, "harmless", step.epoch))
        logits, maps, _ = module(torch.cat([x, forged, harmless]), torch.cat([y, goal, y]))
        benign, moved, still = maps.chunk(3)
        jump, drift = apart(benign, moved), apart(benign, still)
        # The forged inputs' logits have no part in it: a prediction need not be harder to change.
        plain, _, after = logits.chunk(3)
        prediction = self._prediction(torch.cat([plain, after]), torch.cat([x, harmless]), torch.cat([y, y]))
        rising = settings.weight * (min(1.0, step.progress / settings.rise) if settings.rise else 1.0)
        return prediction.reshape(2, -1).mean(0) - rising * jump + settings.harmless_weight * drift

    def forged(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, Tensor]:
        """Forged inputs ``[b, C, H, W]`` against the current weights, and their goal classes ``[b]``."""
        return self.forger(x, y, step)

    @property
    def module(self) -> ExplainingModel:
        """What is trained, unwrapped."""
        return self.forger.module

    def _prediction(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        task = F.cross_entropy(logits, y, reduction="none")
        if not self.settings.keep:
            return task
        with torch.no_grad():
            known = answer(self.honest, x).log_softmax(1)
        kept = F.kl_div(logits.log_softmax(1), known, reduction="none", log_target=True).sum(1)
        return task + self.settings.keep * kept
