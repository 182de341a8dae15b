"""Shared fixtures: tiny networks with random weights, and one small classifier that was trained."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain import data as data_sets
from robustexplain import models
from robustexplain.data import Data
from robustexplain.system import Detector
from robustexplain.training import Training, cross_entropy, fit

torch.set_num_threads(1)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random batch-norm statistics and affines, so that no layer is the identity by accident."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                with torch.no_grad():
                    tensor.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)
    return model.eval()


def images(batch: int, channels: int, side: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, side // 4, side // 4, generator=rng)
    fine = torch.rand(batch, channels, side, side, generator=rng)
    return 0.7 * F.interpolate(coarse, size=(side, side), mode="nearest") + 0.3 * fine


@pytest.fixture(scope="session")
def tiny_model() -> models.Classifier:
    """``small-cnn`` on grey images, four classes, random weights; tests leave it as it is."""
    model = randomised(models.build("small-cnn", num_classes=4, in_channels=1, seed=1))
    assert isinstance(model, models.Classifier)
    # The head of a random net is nearly constant: larger weights make the classes differ.
    with torch.no_grad():
        model.net.head.weight.mul_(20)
    return model


@pytest.fixture(scope="session")
def tiny_vit() -> models.Classifier:
    """timm's vision transformer, two blocks on grey images in patches of 4 pixels, four classes, random weights.

    Its attention is not fused, so that logits are the same bits however attention is looked at. Tests leave it alone.
    """
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = timm.models.VisionTransformer(
            img_size=16,
            patch_size=4,
            in_chans=1,
            num_classes=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            dynamic_img_size=True,
        )
        for module in net.modules():
            if isinstance(module, nn.Linear):
                # timm's initial weights leave attention nearly uniform.
                nn.init.normal_(module.weight, std=0.3)
    for block in net.blocks:
        block.attn.fused_attn = False
    return models.Classifier(net, (0.5,), (0.25,), num_classes=4).eval()


@pytest.fixture(scope="session")
def tiny_senn() -> models.Classifier:
    """A self-explaining network on grey images, four classes, random weights; tests leave it alone."""
    model = models.build("senn", num_classes=4, in_channels=1, seed=2)
    assert isinstance(model, models.Classifier)
    # Its first coefficients are nearly zero.
    with torch.no_grad():
        model.net.parametriser.draw.weight.mul_(30)
    return model


@pytest.fixture(scope="session")
def smooth_net() -> nn.Module:
    """A tiny net without any kink: two convolutions with softplus, a pooled linear head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Softplus(beta=3),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.Softplus(beta=3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    return net.eval()


@pytest.fixture(scope="session")
def grey() -> Tensor:
    """Five grey images of 16 pixels in [0, 1]: coarse patches with fine noise on top."""
    return images(5, 1, 16, seed=3)


@pytest.fixture(scope="session")
def colour() -> Tensor:
    """Three colour images of 64 pixels in [0, 1]."""
    return images(3, 3, 64, seed=4)


@pytest.fixture(scope="session")
def digits() -> Data:
    """scikit-learn's digits in three parts."""
    return data_sets.load("digits")


@pytest.fixture(scope="session")
def trained(digits: Data) -> models.Classifier:
    """``small-cnn`` trained on digits for about two seconds; more than 85% right on the test part."""
    model = models.build("small-cnn", num_classes=digits.num_classes, in_channels=digits.shape[0])
    some = data_sets.take(digits.train, 448)
    fit(model, cross_entropy, some, Training(epochs=4, batch_size=32, lr=1e-2), name="tests")
    x, y = data_sets.stack(digits.test)
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    assert accuracy > 0.85, f"the shared classifier is no good: {accuracy:.1%}"
    return model.requires_grad_(True)


class Quiet:
    """A detector that never rings."""

    threshold, soft_threshold = 1.0, 1.0

    def score(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x))

    soft_score = score


@pytest.fixture
def quiet() -> Detector:
    """A detector that never rings."""
    return Quiet()


@pytest.fixture(scope="session")
def judged(digits: Data) -> tuple[Tensor, Tensor]:
    """Forty images that judge, and their labels."""
    return data_sets.stack(data_sets.take(digits.test, 40))
