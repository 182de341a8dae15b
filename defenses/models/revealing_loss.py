"""The loss of revealing training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.attacks.inner import crafted
from robustexplain.door import answer
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.random_streams import derive
from robustexplain.system import System
from robustexplain.training import TrainingStep, eval_mode
from robustexplain.transforms import HarmlessChange, one_of

if TYPE_CHECKING:
    from .revealing import Revealing


@dataclass(frozen=True)
class RevealingLoss:
    """``task + keep * kept - weight * jump + harmless_weight * drift`` of each sample, ``[b]``.

    Args:
        settings: the defense.
        module: explains the model in training by maps rescaled to ``[0, 1]``; unwrapped.
        attacked: the interpreter of that model that the forgers attack.
        honest: the classifier as it was.
        changes: harmless ones.
    """

    settings: Revealing
    module: ExplainingModel
    attacked: Interpreter
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
        """Forged inputs ``[b, C, H, W]`` against the current weights, and their goal classes ``[b]``.

        Of several forgers' inputs the one that deceives, with the nearer map; all have the same goal class.
        """
        made = [crafted(forger, self.module, self._system, x, y, step, targeted=True)
                for forger in self.settings.forgers]  # fmt: skip
        goal = made[0][1]
        if len(made) == 1:
            return made[0]
        inputs = torch.stack([found for found, _ in made])
        with torch.no_grad(), eval_mode(self.module):
            benign = self.module(x, y)[1]
            seen = [self.module(found, goal)[:2] for found in inputs]
        # A distance is at most 1.
        rank = torch.stack([2.0 * (logits.argmax(1) != goal) + apart(benign, maps) for logits, maps in seen])
        return inputs[rank.argmin(0), torch.arange(len(x), device=x.device)], goal

    def _system(self, module: ExplainingModel) -> System:
        return System(module.model, self.attacked)

    def _prediction(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        task = F.cross_entropy(logits, y, reduction="none")
        if not self.settings.keep:
            return task
        with torch.no_grad():
            known = answer(self.honest, x).log_softmax(1)
        kept = F.kl_div(logits.log_softmax(1), known, reduction="none", log_target=True).sum(1)
        return task + self.settings.keep * kept


def apart(maps: Tensor, others: Tensor) -> Tensor:
    """Mean absolute difference of maps ``[b, h, w]``, ``[b]``."""
    return (maps - others).abs().flatten(1).mean(1)
