"""Every family of torchvision's classifiers is built by name, answers, and has a map of its last layer."""

from __future__ import annotations

import pytest
import torch

from robustexplain import models
from robustexplain.interpreters import GradCAM

FAMILIES = {
    "resnet18": 32, "vgg11": 32, "densenet121": 32, "googlenet": 32, "inception_v3": 96, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "efficientnet_b0": 32, "regnet_y_400mf": 32, "convnext_tiny": 32, "swin_t": 64,
    "vit_b_16": 224, "maxvit_t": 224, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "mnasnet0_5": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_built_and_answers(name: str) -> None:
    model, side = models.load(f"torchvision:{name}", num_classes=3), FAMILIES[name]
    with torch.no_grad():
        assert model(torch.rand(1, 3, side, side)).shape == (1, 3)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1"])
def test_a_family_has_a_map(name: str) -> None:
    maps = GradCAM(models.load(f"torchvision:{name}", num_classes=3))(torch.rand(1, 3, 96, 96))
    assert maps.shape == (1, 96, 96)
    assert maps.isfinite().all()
