"""SafetyNet: a support vector machine on the codes of late activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD, Attack
from robustexplain.autograd.layers import logit_layer
from robustexplain.errors import FieldError
from robustexplain.fields import Count, Positive
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session

from .base import Detector, DetectorDefense
from .detector import in_batches
from .learned import NamedAttack, check_attack, seen_attacked
from .penultimate import penultimate


@DETECTORS.register("safetynet", paper="Lu, Issaranon and Forsyth 2017 (SafetyNet)")
@dataclass(frozen=True, eq=False)
class SafetyNetDetector(Detector):
    """A support vector machine with a Gaussian kernel on the levels of the units in front of the logits.

    Args:
        model: the deployed classifier.
        layer: name of the linear layer that gives the logits, whose input the units are.
        edges: ``[U, L]``, rising levels of each unit; its code is how many it exceeds.
        width: ``[U]``, within which the stand-in of a code rises by one.
        vectors: ``[V, U]``, codes of the support vectors.
        weights: ``[V]``, of the support vectors; positive ones are attacked.
        bias: of the sum.
        gamma: of the kernel ``exp(-gamma |a - b|^2)``.
    """

    model: nn.Module
    layer: str
    edges: Tensor
    width: Tensor
    vectors: Tensor
    weights: Tensor
    bias: float
    gamma: Positive

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the machine's decision value; above 0 it is attacked."""
        return self._decision(codes(penultimate(self.model, self.layer, x)[0], self.edges))

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same value; its gradient is that of codes with sigmoids for steps."""
        units = penultimate(self.model, self.layer, x)[0]
        soft = ((units[:, :, None] - self.edges.to(units)) / self.width.to(units)[:, None]).sigmoid().sum(2)
        return self._decision(soft + (codes(units, self.edges) - soft).detach())

    def _decision(self, code: Tensor) -> Tensor:
        vectors, weights = self.vectors.to(code), self.weights.to(code)
        square = code.square().sum(1)[:, None] + vectors.square().sum(1) - 2 * code @ vectors.mT
        return (-self.gamma * square).exp() @ weights + self.bias


@DEFENSES.register("safetynet", paper="Lu, Issaranon and Forsyth 2017 (SafetyNet)", needs=("data",))
@dataclass(frozen=True)
class SafetyNet(DetectorDefense):
    """Add a support vector machine on the discrete codes of the units in front of the logits.

    There is no published code. The paper's are the Gaussian kernel and the codes of late rectified units. Ours: the
    units in front of the logits alone, levels that are quantiles of clean training inputs, a kernel of scikit-learn's
    ``scale``, equal weight of both classes, and the threshold. What is stored are numbers.

    Args:
        attack: the only one that the detector is trained on.
        levels: of a unit, at least 1: 1 is above or below the median.
        cost: of an error, ``C`` of the machine.

    Raises:
        FieldError: an attack that gives nothing to train on.
    """

    attack: Attack | NamedAttack = field(default_factory=lambda: PGD(steps=40))
    levels: Count = 3
    cost: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attack(self, self.attack)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        from sklearn.svm import SVC

        assert isinstance(self.attack, Attack)  # checked when it was made; for the type checker
        layer = logit_layer(system.model, x)
        inputs, labels = seen_attacked(self.attack, system.without_detector(), x, y, self.batch_size, self.seed)
        units = in_batches(lambda part: penultimate(system.model, layer, part)[0], inputs, self.batch_size)
        clean = units[: len(x)]
        shares = torch.linspace(0, 1, self.levels + 2, dtype=clean.dtype, device=clean.device)[1:-1]
        edges, width = clean.quantile(shares, dim=0).mT, clean.std(0, correction=0) / (self.levels + 1)
        code = codes(units, edges)
        if not bool((code != code[:1]).any()):
            raise FieldError(type(self).__name__, "levels", f"all inputs have one code, with levels={self.levels}")
        # Without a seed of its own scikit-learn draws one from numpy's global state.
        seed = derive(self.seed, "machine") % 2**32
        machine = SVC(C=self.cost, kernel="rbf", gamma="scale", class_weight="balanced", random_state=seed)
        machine.fit(code.cpu().double().numpy(), labels.numpy())
        vectors, weights = (torch.tensor(part).to(units) for part in (machine.support_vectors_, machine.dual_coef_[0]))
        bias, gamma = float(machine.intercept_[0]), float(machine._gamma)
        smooth = torch.where(width > 0, width, 1)
        return SafetyNetDetector(system.model, layer, edges, smooth, vectors, weights, bias, gamma)


def codes(units: Tensor, edges: Tensor) -> Tensor:
    """``[B, U]``: how many of its levels each unit exceeds."""
    return (units[:, :, None] > edges.to(units)).sum(2).to(units.dtype)
