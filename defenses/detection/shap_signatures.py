"""SHAP signatures: the Shapley values of the units in front of the logits, for every class."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD, Attack
from robustexplain.autograd.layers import logit_layer, submodule
from robustexplain.fields import Count
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session, Training

from .base import Detector, DetectorDefense
from .detector import in_batches
from .learned import FeatureNetwork, NamedAttack, check_attack, learned, seeded, seen_attacked
from .penultimate import penultimate


@DETECTORS.register("shap-signatures", paper="Fidel, Bitton and Shabtai 2020")
@dataclass(frozen=True, eq=False)
class SHAPSignaturesDetector(Detector):
    """A network on the Shapley values of the units in front of the logits, for every class.

    The last layer is linear, so that its Shapley values have a closed form, ``W_ku (a_u - mean a_u)``.

    Args:
        model: the deployed classifier.
        layer: name of the linear layer that gives the logits.
        mean: ``[U]``, of the units on clean inputs: the background.
        network: on the ``K U`` values.
    """

    model: nn.Module
    layer: str
    mean: Tensor
    network: FeatureNetwork

    def signature(self, x: Tensor) -> Tensor:
        """``[B, K, U]``: the values; for each class they add up to its logit less that of the background."""
        return signatures(self.model, self.layer, x, self.mean)

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the log-odds of being attacked."""
        return self.soft_score(x)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same."""
        found: Tensor = self.network(self.signature(x).flatten(1))
        return found


@DEFENSES.register("shap-signatures", paper="Fidel, Bitton and Shabtai 2020", needs=("data",))
@dataclass(frozen=True)
class SHAPSignatures(DetectorDefense):
    """Add a detector that classifies the Shapley values of the units in front of the logits, for every class.

    There is no published code, and the background's size is not in the paper. The paper computes the values by Deep
    SHAP, which for a linear layer is the closed form used here: one forward pass, and an exact gradient for an
    adversary. Ours: one hidden layer (others read three, of 256, 128 and 16 units), the mean of the clean training
    inputs as the background, the threshold at a share of false alarms, and the optimiser.

    Args:
        attack: the only one that the detector is trained on.
        hidden: units of the network's hidden layer.
        training: of the network.

    Raises:
        FieldError: an attack that gives nothing to train on.
    """

    attack: Attack | NamedAttack = field(default_factory=lambda: PGD(steps=40))
    hidden: Count = 64
    training: Training = field(default_factory=lambda: Training(epochs=40, lr=3e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attack(self, self.attack)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        assert isinstance(self.attack, Attack)  # checked when it was made; for the type checker
        model, layer = system.model, logit_layer(system.model, x)
        inputs, labels = seen_attacked(self.attack, system.without_detector(), x, y, self.batch_size, self.seed)
        mean = in_batches(lambda part: penultimate(model, layer, part)[0], x, self.batch_size).mean(0)
        found = in_batches(lambda part: signatures(model, layer, part, mean).flatten(1), inputs, self.batch_size)
        network = seeded(FeatureNetwork, {"features": found.shape[1], "hidden": self.hidden}, self.seed)
        network.to(x.device).standardising(found)
        learned(network, found, labels, self, system, (x, y), session)
        return SHAPSignaturesDetector(model, layer, mean, network)


def signatures(model: nn.Module, layer: str, x: Tensor, mean: Tensor) -> Tensor:
    """``[B, K, U]``: see :class:`SHAPSignaturesDetector`."""
    weight: Tensor = submodule(model, layer).weight  # type: ignore[assignment]
    units = penultimate(model, layer, x)[0]
    return weight * (units - mean.to(units))[:, None]
