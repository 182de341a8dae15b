"""ML-LOO: how far a network's answers spread when parts of the input are left out one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD, Attack
from robustexplain.autograd.layers import captured, pyramid, submodule
from robustexplain.door import answer
from robustexplain.errors import UnsupportedModelError
from robustexplain.fields import Count
from robustexplain.interpreters.base import pick
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session, Training

from .base import Detector, DetectorDefense
from .detector import in_batches
from .learned import (
    FeatureNetwork,
    NamedAttack,
    check_attack,
    images_only,
    learned,
    refuse_misfit,
    seeded,
    seen_attacked,
)

AT_ONCE = 256
"""Images of one forward pass at most, where no gradient is asked for."""


@DETECTORS.register("ml-loo", paper="Yang et al. 2020 (ML-LOO) and code")
@dataclass(frozen=True, eq=False)
class MLLOODetector(Detector):
    """Logistic regression on the spread of leave-one-out attributions, of every unit of several layers.

    Args:
        model: the deployed classifier.
        layers: names of layers with feature maps, whose channels' means are units.
        network: on the spreads.
        patch: side of the squares of pixels that are left out (set to 0) one by one.
    """

    model: nn.Module
    layers: tuple[str, ...]
    network: FeatureNetwork
    patch: int = 1

    def spreads(self, x: Tensor) -> Tensor:
        """``[B, U]``: the interquartile range, over patches, of ``u(x) - u(x without the patch)`` for each unit."""
        return spreads(self.model, self.layers, x, self.patch)

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the log-odds of being attacked."""
        return self.soft_score(x)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same; the derivative of a range is that of the order statistics it is made of."""
        found: Tensor = self.network(self.spreads(x))
        return found


@DEFENSES.register("ml-loo", paper="Yang et al. 2020 (ML-LOO) and code", needs=("data",))
@dataclass(frozen=True)
class MLLOO(DetectorDefense):
    """Add a detector that compares how far the answers of a network spread when patches are left out one by one.

    Departures: the code leaves out each channel of each pixel by itself (3073 passes an image of CIFAR-10); here a
    square of pixels with all its channels is left out at a time, by default of a side that gives 64 squares. The units
    are the channels' means of the last feature map at each grid size, the logits and the probability of the predicted
    class. The regression is trained by the loop of every training, where the code cross-validates its penalty.

    Args:
        attack: the only one that the detector is trained on; the code's is C&W.
        patch: side of a square of pixels; ``auto``: an eighth of the image's longer side, one at least. 1 is the
            paper's on grey images.
        layers: names of layers with feature maps; none: the last at each grid size, where the network has such.
        training: of the regression.

    Raises:
        FieldError: an attack that gives nothing to train on.
    """

    attack: Attack | NamedAttack = field(default_factory=lambda: PGD(steps=40))
    patch: Count | Literal["auto"] = "auto"
    layers: Sequence[str] = ()
    training: Training = field(default_factory=lambda: Training(epochs=60, lr=1e-2))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        check_attack(self, self.attack)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return images_only(self, shape)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        refuse_misfit(self, x)
        assert isinstance(self.attack, Attack)  # checked when it was made; for the type checker
        layers = self._layers(system.model, x)
        patch = max(max(x.shape[-2:]) // 8, 1) if self.patch == "auto" else self.patch
        inputs, labels = seen_attacked(self.attack, system.without_detector(), x, y, self.batch_size, self.seed)
        found = in_batches(lambda part: spreads(system.model, layers, part, patch), inputs, self.batch_size)
        network = seeded(FeatureNetwork, {"features": found.shape[1]}, self.seed).to(x.device).standardising(found)
        learned(network, found, labels, self, system, (x, y), session)
        return MLLOODetector(system.model, layers, network, patch)

    def _layers(self, model: nn.Module, x: Tensor) -> tuple[str, ...]:
        for name in self.layers:
            submodule(model, name)
        try:
            return tuple(self.layers) or tuple(layer.name for layer in pyramid(model, x[:1]))
        except UnsupportedModelError:
            # A network without feature maps, such as a transformer: its answers alone.
            return ()


def spreads(model: nn.Module, layers: Sequence[str], x: Tensor, patch: int) -> Tensor:
    """``[B, U]``: see :meth:`MLLOODetector.spreads`."""
    whole, classes = _units(model, layers, x, None)
    masks = left_out(x, patch)
    # With a gradient all passes are kept, and one at a time is as good as another.
    step = max(AT_ONCE // len(x), 1)
    parts = []
    for some in masks.split(step):
        without = (x[:, None] * some[None, :, None]).flatten(0, 1)
        units, _ = _units(model, layers, without, classes.repeat_interleave(len(some)))
        parts.append(whole[:, None] - units.unflatten(0, (len(x), len(some))))
    attributions = torch.cat(parts, 1)
    low, high = attributions.quantile(attributions.new_tensor([0.25, 0.75]), dim=1)
    found: Tensor = high - low
    return found


def left_out(x: Tensor, patch: int) -> Tensor:
    """``[M, H, W]``: masks of ones, each with one square of zeros; together the squares cover the image."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device) // patch
    columns = torch.arange(width, device=x.device) // patch
    square = rows[:, None] * (int(columns[-1]) + 1) + columns
    kept: Tensor = square != torch.arange(int(square[-1, -1]) + 1, device=x.device)[:, None, None]
    return kept.to(x.dtype)


def _units(model: nn.Module, layers: Sequence[str], x: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """``[B, U]``: units of the layers, logits and the probability of ``classes``; and these, default the predicted."""
    with captured(model, layers) as outputs:
        logits = answer(model, x)
        units = [outputs[name].mean((2, 3)) for name in layers]
    classes = logits.argmax(1) if classes is None else classes
    return torch.cat([*units, logits, pick(logits.softmax(1), classes)[:, None]], 1), classes
