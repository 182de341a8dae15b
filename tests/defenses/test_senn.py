"""Self-explaining networks: what they compute, what their penalty does, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import robustexplain as rx
from robustexplain import models
from robustexplain.data import Data, stack, take
from robustexplain.defenses import AdversarialTraining, SelfExplaining
from robustexplain.defenses.models.senn import unfaithfulness
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import CAM, Gradient, Theta
from robustexplain.models import Classifier
from robustexplain.system import Detector
from robustexplain.training import Training

SETTINGS = Training(epochs=3, batch_size=32, lr=3e-3, weight_decay=0.0)


def test_logits_are_sums_of_what_theta_shows(tiny_senn: Classifier, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_senn).double()
    x = grey.double()
    normalised = (x - model.mean) / model.std
    logits = model(x)
    for c in range(4):
        maps = Theta(model)(x, torch.full((5,), c))
        torch.testing.assert_close((maps * normalised[:, 0]).sum((1, 2)) + model.net.bias[c], logits[:, c])
    assert float(logits.std(0).min()) > 0.05
    assert model(x[..., :13]).shape == (5, 4)


def test_the_penalty_is_the_distance_to_the_jacobian(tiny_senn: Classifier, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_senn).double()
    x = grey[:3].double()
    everything = torch.arange(4).expand(3, 4)
    logits, found = unfaithfulness(model, x, everything)
    assert torch.equal(logits, model(x))
    net = model.net
    for i in range(3):
        z = ((x - model.mean) / model.std)[i : i + 1]
        slope = torch.autograd.functional.jacobian(lambda v: net(v)[0], z)[:, 0]  # type: ignore[no-untyped-call]
        torch.testing.assert_close(found[i], (net.parametriser(z)[0].unflatten(0, (4, 1)) - slope).norm())
    # Of one class each: the mean square over classes is that of all.
    each = torch.stack([unfaithfulness(model, x, everything[:, c : c + 1])[1] for c in range(4)])
    torch.testing.assert_close(each.square().mean(0).sqrt(), found)
    found.sum().backward()
    assert net.parametriser.draw.weight.grad is not None


def test_the_penalty_brings_the_coefficients_nearer_to_the_gradient(trained: Classifier, digits: Data) -> None:
    x, y = (torch.nn.functional.avg_pool2d(v, 2) if v.dim() == 4 else v for v in stack(take(digits.train, 320)))
    before, apart = rx.System(trained, CAM(trained)), []
    for weight in (0.0, 0.3):
        after = SelfExplaining(weight, classes=1, training=SETTINGS)(before, TensorDataset(x, y))
        assert isinstance(after.interpreter, Theta)
        assert after.model.num_classes == 10
        found = unfaithfulness(after.model, x[:16], torch.arange(10).expand(16, 10))[1].detach()
        size = Theta(after.model)(x[:16], y[:16]).detach().flatten(1).norm(dim=1)
        apart.append(float((found / size).mean()))
        right = float((after.model(x).argmax(1) == y).double().mean())
        print(f"weight {weight}: distance over size {apart[-1]}, accuracy in training {right}")
        assert right > 0.15
    assert apart[1] < 0.7 * apart[0]


def test_it_refuses_what_it_would_undo(trained: Classifier, few: Dataset[Any], quiet: Detector) -> None:
    with pytest.raises(UnsupportedModelError, match="this Classifier is no self-explaining network"):
        Theta(trained)(stack(few, range(1))[0])
    once = AdversarialTraining(training=Training(epochs=1, batch_size=20))
    hardened = replace(rx.System(trained, Gradient(trained)), defenses=(once.name,))
    with pytest.raises(UnsupportedModelError, match=r"undo what was applied already \(pgd-at\): apply senn first"):
        SelfExplaining()(hardened, few)
    with pytest.raises(UnsupportedModelError, match="apply senn first, then add the detector"):
        SelfExplaining()(rx.System(trained, Gradient(trained), quiet), few)
    behind = trained.with_transforms(["jpeg-75"])
    with pytest.raises(UnsupportedModelError, match=r"in front of it would be lost: build models\.load\('senn'"):
        SelfExplaining()(rx.System(behind, Gradient(behind)), few)
    # One that explains itself already is trained further.
    own = models.build("senn", num_classes=10, in_channels=1)
    kept = SelfExplaining(classes=1, training=Training(epochs=1, batch_size=20)).hardened(own, few)
    assert isinstance(kept, nn.Module)
    assert not any(torch.equal(a, b) for a, b in zip(own.parameters(), kept.parameters(), strict=True))
