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
from robustexplain.data import stack
from robustexplain.defenses import AdversarialTraining, SelfExplaining
from robustexplain.defenses.models.senn import unfaithfulness
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import CAM, Gradient, Theta
from robustexplain.models import Classifier
from robustexplain.system import Detector
from robustexplain.training import Training

SETTINGS = Training(epochs=6, batch_size=16, lr=5e-3, weight_decay=0.0)


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


def quadrants(number: int) -> TensorDataset:
    """Images whose class is the quadrant that is bright."""
    x = 0.4 * torch.rand(number, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    y = torch.arange(number) % 4
    for image, k in zip(x, y.tolist(), strict=True):
        image[0, 6 * (k // 2) :, 6 * (k % 2) :][:6, :6] += 0.5
    return TensorDataset(x, y)


def test_the_penalty_brings_the_coefficients_nearer_to_the_gradient(tiny_model: Classifier) -> None:
    data = quadrants(128)
    x, y = data.tensors
    before, apart, right = rx.System(tiny_model, CAM(tiny_model)), [], []
    for weight in (0.0, 0.3):
        after = SelfExplaining(weight, classes=1, training=SETTINGS)(before, data)
        assert isinstance(after.interpreter, Theta)
        assert after.model.num_classes == 4
        found = unfaithfulness(after.model, x[:32], torch.arange(4).expand(32, 4))[1].detach()
        size = Theta(after.model)(x[:32], y[:32]).detach().flatten(1).norm(dim=1)
        apart.append(float((found / size).mean()))
        right.append(float((after.model(x).argmax(1) == y).double().mean()))
    print(f"distance over size {apart}, accuracy {right} (without and with the penalty)")
    assert apart[1] < 0.7 * apart[0]
    assert min(right) > 0.8


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
