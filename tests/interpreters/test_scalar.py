"""Explaining any scalar of a model's answer: ``target`` is a function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import interpreters, models
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import AttentionRollout, GradCAM, Gradient, IntegratedGradients


def test_gradient_cam_and_occlusion_of_a_logit_difference_are_those_by_hand(
    tiny_model: models.Classifier, grey: Tensor
) -> None:
    def difference(logits: Tensor) -> Tensor:
        return logits[:, 1] - logits[:, 3]

    x = grey.clone().requires_grad_()
    (by_hand,) = torch.autograd.grad(difference(tiny_model(x)).sum(), x)
    torch.testing.assert_close(Gradient(tiny_model, channels="sum")(grey, difference), by_hand.sum(1))
    cams = [GradCAM(tiny_model, relu=False)(grey, torch.full((5,), c)) for c in (1, 3)]
    torch.testing.assert_close(GradCAM(tiny_model, relu=False)(grey, difference), cams[0] - cams[1])
    covered = grey.clone()
    covered[:, :, :4, :4] = 0.5
    fall = (difference(tiny_model(grey)) - difference(tiny_model(covered))).detach()
    maps = interpreters.Occlusion(tiny_model, window=4, stride=4)(grey, difference)
    torch.testing.assert_close(maps[:, 0, 0], fall)
    assert torch.equal(maps[:, 3, 3], maps[:, 0, 0])


class Segmenter(nn.Module):
    """Scores of three classes at every second pixel, in a dictionary, as torchvision's segmenters answer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False), nn.ReLU())
            self.head = nn.Conv2d(6, 3, 1, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.body(x)), "features": x}


def region(answer: dict[str, Tensor]) -> Tensor:
    """The mean score of class 1 in the upper left corner."""
    return answer["out"][:, 1, :4, :4].mean((1, 2))


def test_a_segmenters_class_over_a_region_is_explained(grey: Tensor) -> None:
    net = Segmenter().eval()
    value = region(net(grey)).detach()
    complete = IntegratedGradients(net, steps=64)(grey, region)
    torch.testing.assert_close(
        complete.sum((1, 2)), value - region(net(torch.zeros_like(grey))).detach(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(interpreters.DeepLIFT(net)(grey, region).sum((1, 2)), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        interpreters.LRP(net, conv="epsilon", epsilon=1e-9)(grey, region).sum((1, 2)), value, rtol=1e-3, atol=1e-5
    )
    gradient = Gradient(net)(grey, region)
    assert gradient[:, :8, :8].abs().sum() > 0
    assert not gradient[:, 9:].any(), "pixels that the region does not see"
    # The class's weights over 16 of 64 positions, by hand.
    features = net.body(grey)
    weights = net.head.weight[1, :, 0, 0] * 16 / 16 / 64
    cam = GradCAM(net, layer="body", relu=False).explain(grey, region, native=True).maps
    torch.testing.assert_close(cam, torch.einsum("k,bkhw->bhw", weights, features))


def test_a_regression_is_explained_in_a_system(grey: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Softplus(), nn.Linear(8, 1)).eval()
    system = rx.System(net, IntegratedGradients(net))
    seen = system(grey, target=lambda answer: answer[:, 0])
    torch.testing.assert_close(seen.logits, net(grey))
    expected = (net(grey) - net(torch.zeros_like(grey)))[:, 0]
    torch.testing.assert_close(seen.maps.sum((1, 2)), expected, rtol=1e-3, atol=1e-5)
    table = nn.Sequential(nn.Linear(4, 1)).eval()
    rows = torch.randn(3, 4)
    found = interpreters.InputXGradient(table)(rows, lambda answer: answer[:, 0])
    torch.testing.assert_close(found, (rows * table[0].weight).detach())
    background = torch.randn(6, 4)
    shapley = interpreters.SHAPTabular(table, interpreters.Reference(background), samples=14)
    by_hand = ((rows - background.mean(0)) * table[0].weight).detach()
    torch.testing.assert_close(shapley(rows, lambda answer: answer[:, 0]), by_hand, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="explains classes"):
        interpreters.LIMETabular(table, interpreters.Reference(background))(rows, lambda answer: answer[:, 0])


def test_maps_of_a_scalar_are_differentiable(tiny_model: nn.Module, grey: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    x = grey[:2, :, :8, :8].double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()

    def total(x: Tensor) -> Tensor:
        maps = Gradient(net, channels="sum")(x, lambda answer: answer[:, 0] * answer[:, 1])
        return maps.square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    step = 1e-5
    numeric = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-10)


def test_what_is_found_is_that_of_the_model_itself(tiny_model: models.Classifier, grey: Tensor) -> None:
    named = GradCAM(tiny_model, layer="net.features.3")
    front = models.Transformed(tiny_model, ["median-1"])
    expected = named(grey, torch.full((5,), 1))
    torch.testing.assert_close(named(grey, lambda z: z[:, 1]), expected)
    # In a model around it, whose own name for it differs.
    torch.testing.assert_close(GradCAM(front, layer="net.features.3")(grey, lambda z: z[:, 1]), expected)
    scores = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    torch.testing.assert_close(GradCAM(scores)(grey, lambda z: z[:, 1]), GradCAM(scores)(grey, torch.full((5,), 1)))


def test_rollout_explains_scalars_where_it_depends_on_what_is_explained(tiny_vit: nn.Module, grey: Tensor) -> None:
    weighted = AttentionRollout(tiny_vit, weighting="gradient")
    torch.testing.assert_close(weighted(grey, lambda z: z[:, 1]), weighted(grey, torch.full((5,), 1)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda z: z, r"a tensor \[\d\], got \[\d, 4\]"),
        (lambda z: z[:, 0].sum(), r"a tensor \[\d\], got \[\] of"),
        (lambda z: z.argmax(1), r"a tensor \[\d\], got \[\d\] of torch.int64"),
        (lambda z: 1.0, "got float"),
        (lambda z: z[:, 0].detach(), "without a gradient"),
        (lambda z: z[:, 0] / 0, r"NaN or infinity for (\d) of \1"),
        (lambda z: z["logits"], r"failed on its answer to \d inputs"),
        (lambda z: z[:, 0] * torch.ones(3), r"failed on its answer to \d inputs"),
        (1, "integer tensor of class indices, or a function"),
    ],
)
def test_a_scalar_that_is_none_is_refused(target: Any, message: str, tiny_model: nn.Module, grey: Tensor) -> None:
    with pytest.raises(InputError, match=message):
        Gradient(tiny_model)(grey, target)


def test_a_scalar_without_a_gradient_is_explained_by_covering(tiny_model: nn.Module, grey: Tensor) -> None:
    method = interpreters.Occlusion(tiny_model, window=8, stride=8)
    found = method(grey.clone().requires_grad_(), lambda z: (z[:, 0] > z[:, 1]).float())
    assert set(found.unique().tolist()) <= {-1.0, 0.0, 1.0}
