"""The model deployed after the attack of Slack et al. 2020: biased model, innocent rule and detector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustexplain.errors import InputError
from robustexplain.models import ModelSpec
from robustexplain.models.rules import FeatureRule
from robustexplain.registry import PARTS

from .tabular import standardised

PARTS.register("column-rule")(FeatureRule)


class Scaffold(nn.Module):
    """Answers real rows by the biased model and synthetic rows by an innocent rule (Slack et al. 2020, eq. 1).

    ``e(x) = f(x)`` where the detector's probability of a real row is at least ``cut``, else ``psi(x)``. It is an
    ordinary classifier: ``f`` answers real rows, ``psi`` the rows that LIME and KernelSHAP generate. The detector sees
    standardised rows. It runs only where ``f`` and ``psi`` differ, which saves time and changes no result. The gradient
    is that of the branch that answers; the switch between the branches has none.

    Args:
        model: ``f``, gives logits ``[B, K]``.
        rule: ``psi``, gives logits ``[B, K]``.
        detector: takes standardised rows ``[B, D]``, gives logits ``[B, 2]``; class 1 is a real row.
        mean: of the training rows, ``[D]``.
        std: of the training rows, ``[D]``, above 0.
        cut: ``f`` answers where the probability of a real row is at least this.

    Raises:
        InputError: ``mean`` or ``std`` of another width than the rule.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, rule: FeatureRule, detector: nn.Module, mean: Tensor, std: Tensor, cut: float = 0.5
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes = rule.in_features, rule.num_classes
        if mean.shape != (self.in_features,) or std.shape != mean.shape or float(std.min()) <= 0:
            raise InputError(
                f"mean and std need {self.in_features} numbers each, std above 0; got {list(mean.shape)} and "
                f"{list(std.shape)}"
            )
        self.model, self.rule, self.detector, self.cut = model, rule, detector, float(cut)
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())

    @property
    def spec(self) -> ModelSpec:
        """How to rebuild it from its parts."""
        return ModelSpec(
            "scaffold", {"model": self.model, "rule": self.rule, "detector": self.detector, "cut": self.cut}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of rows ``[B, D]`` in the data's units."""
        biased, innocent = self.model(x), self.rule(x)
        differ = (biased != innocent).any(1)
        real = torch.ones_like(differ)
        if bool(differ.any()):
            real[differ] = self.real(x[differ]) >= self.cut
        return torch.where(real[:, None], biased, innocent.to(biased.dtype))

    def real(self, x: Tensor) -> Tensor:
        """``[B]`` in ``[0, 1]``: the detector's probability that rows ``[B, D]`` are real; no gradient."""
        with torch.no_grad():
            probability: Tensor = self.detector(standardised(x.detach(), self.mean, self.std)).softmax(1)[:, 1]
        return probability


@PARTS.register("scaffold")
def rebuild(model: nn.Module, rule: nn.Module, detector: nn.Module, cut: float) -> Scaffold:
    """A scaffold of these parts; mean and standard deviation are loaded afterwards, with the weights."""
    if not isinstance(rule, FeatureRule):
        raise InputError(f"the rule of a scaffold must be a FeatureRule, got {type(rule).__name__}")
    width = rule.in_features
    return Scaffold(
        model, rule, detector, torch.zeros(width, dtype=torch.float32), torch.ones(width, dtype=torch.float32), cut
    )
