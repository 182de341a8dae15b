"""Maps of a probability on a network so confident that it rounds to 0 or 1: the right direction, or a warning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustexplain.errors import SaturatedWarning
from robustexplain.interpreters import (
    LIME,
    RISE,
    Gradient,
    InputXGradient,
    IntegratedGradients,
    Interpreter,
    KernelSHAP,
    Occlusion,
    Segments,
    SmoothGrad,
)


class Sure(nn.Module):
    """The tiny model, certain of one class whatever the input."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return self.factor * (logits + torch.tensor([0.0, 0.0, 5.0, 0.0]))


SAYS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "smoothgrad": lambda m: SmoothGrad(m, samples=3, sigma=0.01, of="probability"),
    "integrated-gradients": lambda m: IntegratedGradients(m, steps=3, of="probability"),
    "occlusion": lambda m: Occlusion(m, window=8, stride=8),
    "rise": lambda m: RISE(m, samples=8, grid=4),
    "lime": lambda m: LIME(m, samples=20, segments=Segments(number=4)),
    "kernel-shap": lambda m: KernelSHAP(m, 20, Segments(number=4)),
}


@pytest.mark.parametrize("name", SAYS)
def test_a_map_of_a_saturated_probability_says_so(name: str, tiny_model: nn.Module, grey: Tensor) -> None:
    with pytest.warns(SaturatedWarning, match="of='logit'"):
        SAYS[name](Sure(tiny_model, 1e4).eval())(grey)


@pytest.mark.parametrize("kind", [Gradient, InputXGradient])
def test_the_gradient_keeps_its_direction(
    kind: type[Gradient] | type[InputXGradient], tiny_model: nn.Module, grey: Tensor
) -> None:
    sure, target = Sure(tiny_model, 1e4).eval(), torch.full((5,), 2)
    found = kind(sure, of="probability")(grey, target)
    usual = kind(Sure(tiny_model, 20.0).eval(), of="probability")(grey, target)
    assert bool((found.flatten(1).abs().amax(1) > 0).all())
    assert float(torch.cosine_similarity(found.flatten(1), usual.flatten(1), eps=1e-30).min()) > 0.99
