"""Two scans by comparison: with a method that takes no gradients, and with a model that the auditor trusts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.fields import Count
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.perturbation.occlusion import Occlusion
from robustexplain.interpreters.perturbation.rise import RISE
from robustexplain.registry import SCANNERS
from robustexplain.system import System

from .base import ModelScanner, Scan, agreement


@SCANNERS.register("gradient-free-disagreement", paper="this project")
@dataclass(frozen=True)
class GradientFreeDisagreement(ModelScanner):
    """How far the system's maps differ from those of a method that only asks for answers.

    A model that was fine-tuned against one method seldom lies to the other as well. Methods of different kinds disagree
    on honest models too, so the score means something only beside theirs. A system whose own interpreter takes no
    gradients is compared with itself, and the scan says nothing.

    Args:
        by: ``occlusion`` or ``rise``.
        samples: masks of RISE.
        grid: cells a side on which maps are compared.
    """

    by: Literal["occlusion", "rise"] = "occlusion"
    samples: Count = 500
    grid: Count = 7

    def _scan(self, system: System, x: Tensor, y: Tensor, reference: System | None) -> Scan:
        other: Interpreter
        if self.by == "rise":
            other = RISE(system.model, samples=self.samples, seed=self.seed)
        else:
            other = Occlusion(system.model, of="logit")
        with torch.no_grad():
            seen = system.interpreter.explain(x)
            asked = other.explain(x, seen.logits.argmax(1)).maps
        found = agreement(seen.maps, asked, self.grid)
        return Scan(1 - float(found.mean()), {"agreement": float(found.mean()), "lowest": float(found.min())})


@SCANNERS.register("trusted-reference", paper="this project")
@dataclass(frozen=True)
class TrustedReference(ModelScanner):
    """How far the system's maps differ from those of a trusted model for the same task.

    Only samples that both predict alike are compared. Two honest models that were trained from different seeds differ
    too: the score means something only beside theirs.

    Args:
        grid: cells a side on which maps are compared.
    """

    grid: Count = 7

    needs_reference: ClassVar[bool] = True

    def _scan(self, system: System, x: Tensor, y: Tensor, reference: System | None) -> Scan:
        assert reference is not None  # checked before; for the type checker
        with torch.no_grad():
            seen = system.interpreter.explain(x)
            theirs = reference.interpreter.explain(x, seen.logits.argmax(1))
        alike = seen.logits.argmax(1) == theirs.logits.argmax(1)
        if not alike.any():
            raise InputError("the reference predicts none of the probe's samples as the system does: another task?")
        found = agreement(seen.maps[alike], theirs.maps[alike], self.grid)
        return Scan(1 - float(found.mean()), {"agreement": float(found.mean()), "alike": float(alike.float().mean())})
