"""Scans for triggers: of the map, and of the label."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain.checks import Kind
from robustexplain.door import answer
from robustexplain.errors import NotDifferentiableError, ZeroMapGradientWarning
from robustexplain.fields import Count, Fraction, Positive
from robustexplain.interpreters import Interpreter, map_gradient_share
from robustexplain.metrics import Pearson
from robustexplain.registry import SCANNERS
from robustexplain.system import System

from .base import ModelScanner, Scan
from .inversion import invert

FEW, LEAST = 4, 0.05
"""Inputs on which a map's derivative is looked at, and the share of a smooth network's below which there is none."""


@SCANNERS.register("map-trigger", paper="ours, after Wang et al. 2019", needs=("gradients", "differentiable maps"))
@dataclass(frozen=True)
class MapTrigger(ModelScanner):
    """Searches for a trigger that moves the map of every image while the label stays.

    Scanners for backdoors look for a trigger that changes the label, and are blind to one that only changes the map
    (Noppel et al. 2023, simple fooling). The score is half of 1 minus the lowest mean correlation of the maps with and
    without a trigger: 0 nothing moves them, 1 they are turned around. Honest models have such triggers too, and smaller
    ones are no rarer in them: how far the map moves tells more than how large the trigger is.

    Args:
        steps: of Adam.
        weight: of the correlation beside the cross-entropy that keeps the labels.
        kept: share of the labels that must stay.
    """

    steps: Count = 200
    weight: Positive = 3.0
    kept: Fraction = 0.9

    def _scan(self, system: System, x: Tensor, y: Tensor, reference: System | None) -> Scan:
        interpreter = system.interpreter
        if not interpreter.differentiable:
            raise NotDifferentiableError(
                f"map-trigger follows the map's gradient, and {type(interpreter).__name__} has none: scan the same "
                "model under a gradient method"
            )
        with torch.no_grad():
            clean = interpreter.explain(x, native=True)
        _warn_of_no_gradient(interpreter, x[:FEW])
        label, lowest = clean.logits.argmax(1), [1.0]

        def aim(triggered: Tensor) -> tuple[Tensor, bool]:
            seen = interpreter.explain(triggered, label, native=True)
            near = torch.nan_to_num(Pearson()(seen.maps, clean.maps)).mean()
            if (seen.logits.argmax(1) == label).float().mean() >= self.kept:
                lowest.append(float(near.detach()))
            return F.cross_entropy(seen.logits, label) + self.weight * near, False  # its size does not matter

        with torch.enable_grad():
            found = invert(x, aim, self.steps, self.seed)
        return Scan((1 - min(lowest)) / 2, {"correlation": min(lowest), "covered": float(found.mask.mean())})


def _warn_of_no_gradient(interpreter: Interpreter, x: Tensor) -> None:
    if not interpreter.is_gradient:
        return
    with torch.enable_grad():
        share = float(map_gradient_share(interpreter, x).max())
    if share < LEAST:
        warnings.warn(
            f"map-trigger follows the derivative of the map, and that of {type(interpreter).__name__} has {share:.1%} "
            "of the size that it has on a smooth network: rectifiers leave none. The search is led by the labels "
            "alone, and its score says nothing. Scan the same model under CAM or Grad-CAM, or smooth the map first "
            "(beta-smoothing)",
            ZeroMapGradientWarning,
            stacklevel=4,
        )


@SCANNERS.register("neural-cleanse", paper="Wang et al. 2019, sections IV and V", needs=("gradients",))
@dataclass(frozen=True)
class NeuralCleanse(ModelScanner):
    """Searches each class's smallest trigger; the score is how far the smallest of them lies below the others.

    The anomaly index: deviation from the median in units of 1.4826 times the median absolute deviation; above 2 the
    authors take the class for a target. It looks at labels alone, whatever explains the model. ART's
    (adversarial-robustness-toolbox) takes Keras models only.

    Args:
        steps: of Adam, for each class (the authors: 1000).
        success: share of the images that a trigger must send to the class.
    """

    steps: Count = 200
    success: Fraction = 0.99

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _scan(self, system: System, x: Tensor, y: Tensor, reference: System | None) -> Scan:
        with torch.no_grad():
            classes = answer(system.model, x[:1]).shape[1]
        sizes = []
        for goal in range(classes):
            wanted = torch.full((len(x),), goal, device=x.device)

            def aim(triggered: Tensor, wanted: Tensor = wanted) -> tuple[Tensor, bool]:
                logits = answer(system.model, triggered)
                hit = (logits.argmax(1) == wanted).float().mean()
                return F.cross_entropy(logits, wanted), bool(hit >= self.success)

            with torch.enable_grad():
                sizes.append(invert(x, aim, self.steps, self.seed).size)
        index, target = anomaly(torch.tensor(sizes))
        return Scan(
            index, {"target": float(target), "size": sizes[target], "median": float(torch.tensor(sizes).median())}
        )


def anomaly(sizes: Tensor) -> tuple[float, int]:
    """The anomaly index of the smallest of ``sizes`` ``[K]``, and which it is; 0 where all are alike."""
    middle = sizes.double().quantile(0.5)
    spread = 1.4826 * (sizes.double() - middle).abs().quantile(0.5)
    target = int(sizes.argmin())
    return (float((middle - sizes[target]) / spread) if spread > 0 else 0.0), target
