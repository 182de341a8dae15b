"""The attribution regularisers of Sarkar et al.: their formula, and what training moves."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.data import Data, take
from robustexplain.defenses import AttributionRegularisers
from robustexplain.defenses.models.attribution_regularisers import RegularisedLoss
from robustexplain.defenses.models.loss_module import LossModule
from robustexplain.errors import FieldError
from robustexplain.models import Classifier
from robustexplain.training import Training, TrainingStep

NOW = TrainingStep(3, 1, 0.5)
WITHIN = PGD(0.1, 4, 0.04, random_start=True)
SETTINGS = Training(epochs=2, batch_size=32, lr=2e-3, weight_decay=0.0)


def attribution(model: nn.Module, start: Tensor, end: Tensor, of: Any, points: int) -> Tensor:
    """Integrated gradients of one input, point after point."""
    total = torch.zeros_like(end)
    for k in range(1, points + 1):
        z = (start + k / points * (end - start)).detach().requires_grad_()
        total = total + torch.autograd.grad(of(model(z)[0].softmax(0)), z)[0]
    return total / points * (end - start)


def test_the_regularisers_are_those_of_the_paper(smooth_net: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(smooth_net).double(), grey[:3].double()
    y = torch.tensor([1, 0, 3])
    loss = RegularisedLoss(model, AttributionRegularisers(attack=WITHIN, weight=2.0, points=4, inner_points=2))
    found = loss(LossModule(model, model), x, y, NOW)
    (moved,) = loss.others(x, y, NOW)
    for i in range(3):
        a, b, k = x[i : i + 1], moved[i : i + 1], int(y[i])
        black = torch.zeros_like(a)

        def strongest(p: Tensor, k: int = k) -> Tensor:
            return torch.cat([p[:k], p[k + 1 :]]).max()

        def label(p: Tensor, k: int = k) -> Tensor:
            return p[k]

        true, wrong = (attribution(model, black, b, of, 4) for of in (label, strongest))
        flat = torch.full((256,), 1 / 256, dtype=torch.float64)
        contrast = [F.kl_div(v.flatten().log_softmax(0), flat, reduction="sum") for v in (wrong, true)]
        base = attribution(model, black, a, label, 4).flatten()
        change = -attribution(model, a, b, lambda p: -label(p).log(), 4).flatten()
        agree = base.sign() == change.sign()
        weighted = (base * change)[agree].sum() + change[~agree].abs().sum()
        task = F.cross_entropy(model(b), y[i : i + 1])
        torch.testing.assert_close(found[i], task + 2.0 * (contrast[0] - contrast[1] + weighted))
        assert 0 < int(agree.sum()) < 256
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_regularisers_fall_where_plain_adversarial_training_leaves_them(
    trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:16], judged[1][:16]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    moved, data, found = (x + 0.06 * noise).clamp(0, 1), take(digits.train, 96), []
    for weight in (0.0, 1.0):
        settings = AttributionRegularisers(
            attack=PGD(0.06, 1, 0.06, random_start=True), weight=weight, points=3, inner_points=1, training=SETTINGS
        )
        model = settings.hardened(trained, data)
        whole = RegularisedLoss(model, replace(settings, weight=1.0)).terms(model, x, y, NOW, (moved,))
        found.append(float((whole - F.cross_entropy(model(moved), y, reduction="none")).mean().detach()))
    print(f"CACR + WACR {found} (without and with their weight)")
    assert found[1] < found[0]


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(FieldError, match=r"AttributionRegularisers\.attack\.eps must be above 0"):
        AttributionRegularisers(attack=PGD(0.0))
