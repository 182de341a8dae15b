"""A map of one image alone is that of the image in a batch, also where batch norms see tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustexplain.interpreters import DeepLIFT, GradCAM, Gradient, GuidedBackprop


class TokensBehindNorm(nn.Module):
    """Patches, a batch norm, and the mean of tokens, whose gradient comes back in an order that torch mixes up."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patch(x)).flatten(2).mT
        return self.head(torch.relu(self.layer(tokens.mean(1))))


@pytest.mark.parametrize("cls", [Gradient, GuidedBackprop, DeepLIFT, GradCAM])
def test_one_image_has_the_map_that_it_has_in_a_batch(cls: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = TokensBehindNorm(), torch.rand(2, 3, 24, 24)
        nn.init.uniform_(model.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        nn.init.normal_(model.norm.weight)
    interpreter, target = cls(model.eval()), torch.tensor([1, 1])
    together = interpreter.explain(x, target).maps
    alone = torch.cat([interpreter.explain(x[i : i + 1], target[:1]).maps for i in range(2)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_one_image_is_that_of_finite_differences() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = TokensBehindNorm().double().eval(), torch.rand(1, 3, 24, 24).double()
        nn.init.normal_(model.norm.weight)
        direction = torch.randn(24, 24).double()
    maps = Gradient(model, of="logit", channels="sum").explain(x, torch.tensor([1])).maps
    with torch.no_grad():
        ahead, behind = (model(x + h * direction)[0, 1] for h in (1e-7, -1e-7))
    torch.testing.assert_close((maps[0] * direction).sum().detach(), (ahead - behind) / 2e-7, rtol=1e-5, atol=1e-8)
