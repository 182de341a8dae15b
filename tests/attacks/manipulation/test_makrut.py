"""Hegde et al. 2024: models fine-tuned against LIME and RISE, whose maps have no gradient of their own."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import models
from robustexplain.attacks.manipulation import FineTuned, LocationFooling, TopKFooling
from robustexplain.attacks.manipulation.perturbed_maps import with_gradient
from robustexplain.interpreters import LIME, RISE, GradCAM, Interpreter
from robustexplain.interpreters.perturbation.segments import Segments
from robustexplain.metrics import LENS, TopK
from robustexplain.random_streams import Streams
from robustexplain.training import Training

PATCHES = Segments(number=16)


def test_the_map_that_is_trained_on_is_lime_itself(tiny_model: models.Classifier, grey: Tensor) -> None:
    lime = LIME(tiny_model, samples=40, segments=PATCHES, seed=3)
    with torch.no_grad():
        ours, theirs = with_gradient(lime, 64)(grey), lime(grey)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    gradcam = GradCAM(tiny_model)
    assert with_gradient(gradcam, 64) is gradcam


def test_rise_is_trained_on_with_other_masks_than_the_auditors(tiny_model: models.Classifier, grey: Tensor) -> None:
    rise = RISE(tiny_model, samples=50, grid=4)
    trained_on = with_gradient(rise, 64)
    with torch.no_grad():
        ours, others = trained_on(grey), trained_on(grey[1:])
        drawn = int(Streams.of(grey[:1], rise.seed, "rise in training").integers(1 << 31))
        same = replace(rise, seed=drawn)
        masks = same._enlarged(*same._draws(), grey).mean(0) / same.keep
        # The same map but for the mean score times the mean mask.
        scores = (same(grey) - ours) / masks.to(ours)
    assert float((scores.amax((1, 2)) - scores.amin((1, 2))).max()) < 1e-4
    assert float(scores.min()) > 0
    assert drawn != rise.seed
    assert not torch.allclose(ours[1:], others)


@pytest.mark.parametrize("kind", [LIME, RISE])
def test_gradients_to_the_weights_against_finite_differences(kind: type[Interpreter], smooth_net: nn.Module) -> None:
    net = copy.deepcopy(smooth_net).double()
    settings = {"samples": 12} | ({"segments": Segments(number=4)} if kind is LIME else {"grid": 3})
    interpreter = with_gradient(kind(net, **settings), 64)  # type: ignore[call-arg]
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = net[-1].weight  # type: ignore[index]
    towards = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value() -> Tensor:
        return (interpreter(x, torch.tensor([1, 2])) * towards).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        for place in ((0, 1), (1, 3), (2, 5)):
            step = torch.zeros_like(weight)
            step[place] = 1e-5
            weight += step
            up = value()
            weight -= 2 * step
            down = value()
            weight += step
            assert gradient[place].item() == pytest.approx(float(up - down) / 2e-5, rel=1e-5, abs=1e-9)


def pictures(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright square in the quarter that is the class."""
    x = 0.4 * torch.rand(number, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(number) % 4
    for image, label in zip(x, y.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 6 * row + 1 : 6 * row + 5, 6 * column + 1 : 6 * column + 5] += 0.5
    return x, y


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.ReLU())
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 4))
    x, y = pictures(200, 0)
    search = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        search.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        search.step()
    return net.requires_grad_(False).eval()


@pytest.mark.parametrize(
    "kind,attack,apart", [(LIME, LocationFooling(weight=10), 0.2), (RISE, TopKFooling(k=0.25, weight=60), 0.12)]
)
def test_predictions_stay_and_the_map_of_an_independent_auditor_does_not(
    kind: type[LIME] | type[RISE], attack: FineTuned, apart: float, classifier: nn.Module
) -> None:
    """Indiscriminate poisoning: the top pixels of the auditor's own draws are others, at the same accuracy."""
    settings: dict[str, Any] = {"segments": PATCHES} if kind is LIME else {"grid": 4}
    auditor = kind(classifier, samples=400, seed=7, **settings)
    honest = rx.System(classifier, kind(classifier, samples=200, **settings))
    training = Training(epochs=12, batch_size=16, lr=3e-3, weight_decay=0, schedule="constant")
    fooled = replace(attack, budget=0.1, draws=32, training=training)(honest, TensorDataset(*pictures(120, 2)))  # type: ignore[arg-type]
    assert type(fooled.interpreter) is kind
    x, y = pictures(24, 1)
    with torch.no_grad():
        before, again = auditor(x, y), replace(auditor, seed=8)(x, y)
        after = replace(auditor, model=fooled.model)(x, y)
        for metric in (TopK(0.25, magnitude=False), LENS(0.25, magnitude=False)):
            assert metric(after, before).mean() < metric(again, before).mean() - apart, metric
        assert (fooled.model(x).argmax(1) == y).float().mean() > 0.9


def test_what_else_fine_tunes_is_aimed_at_lime_too(tiny_model: models.Classifier) -> None:
    lime = LIME(tiny_model, samples=500)
    aimed = TopKFooling(draws=20).aimed(lime)
    assert aimed.differentiable
    assert aimed.model is tiny_model
    assert aimed.method.samples == 20  # type: ignore[attr-defined]
