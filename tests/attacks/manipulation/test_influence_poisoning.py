"""Koh and Liang 2017: a few training images, changed a little, decide what is said of one chosen image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustexplain as rx
from robustexplain.attacks.manipulation import InfluencePoisoning
from robustexplain.attacks.manipulation.last_layer import fitted, influence, solved
from robustexplain.data import Data, take
from robustexplain.errors import FieldError, NotDifferentiableError
from robustexplain.interpreters import GradCAM, Occlusion
from robustexplain.models import Classifier

ATTACK = InfluencePoisoning(images=10, eps=8 / 255, rounds=15)


@pytest.fixture(scope="module")
def honest(trained: Classifier) -> rx.System:
    return rx.System(trained, GradCAM(trained))


@pytest.fixture(scope="module")
def training(digits: Data) -> Any:
    return take(digits.train, 200)


@pytest.fixture(scope="module")
def victim(trained: Classifier, judged: tuple[Tensor, Tensor]) -> int:
    """An image that is classified rightly, with the margin that a quarter of these fall below."""
    x, y = judged
    with torch.no_grad():
        best = trained(x).topk(2, 1)
    margin = torch.where(best.indices[:, 0] == y, best.values[:, 0] - best.values[:, 1], torch.inf)
    return int(margin.argsort()[len(y) // 4])


def test_the_chosen_prediction_changes_and_nothing_else(
    honest: rx.System, training: Any, judged: tuple[Tensor, Tensor], victim: int
) -> None:
    """Random changes of the same images, as large, do not do it."""
    x, y = judged
    one = slice(victim, victim + 1)
    before = {n: t.clone() for n, t in honest.model.state_dict().items()}
    found = ATTACK.poison(honest, training, x[one], y[one])
    assert found.history[0].wrong == 0
    assert found.history[-1].wrong == 1
    clean = torch.stack([training[int(i)][0] for i in found.rows])
    assert len(found.rows) == 10
    assert float((found.x - clean).abs().max()) <= 8 / 255 + 1e-6
    assert found.x.min() >= 0
    with torch.no_grad():
        trusted, lied, others = (s.model(x).argmax(1) for s in (found.clean, found.system, honest))
    assert int((trusted != lied).sum()) <= 2
    assert trusted[victim] != lied[victim]
    assert float((trusted == others).float().mean()) > 0.9
    assert all(torch.equal(t, honest.model.state_dict()[n]) for n, t in before.items())
    control = replace(ATTACK, by="random").poison(honest, training, x[one], y[one])
    assert torch.equal(control.rows, found.rows)
    assert control.history[-1].wrong == 0
    assert control.history[-1].loss < found.history[-1].loss / 4


def test_a_chosen_map_moves_while_its_prediction_stays(
    honest: rx.System, training: Any, judged: tuple[Tensor, Tensor], victim: int
) -> None:
    one = slice(victim, victim + 1)
    moved, control = (
        replace(ATTACK, aim="map", by=by, images=20, eps=16 / 255, rounds=8).poison(
            honest, training, judged[0][one], judged[1][one]
        )
        for by in ("influence", "random")
    )
    assert moved.history[-1].wrong == 0
    assert 1 - moved.history[-1].likeness > 3 * (1 - control.history[-1].likeness)
    blind = rx.System(honest.model, Occlusion(honest.model))
    with pytest.raises(NotDifferentiableError, match="follows the map's gradient, and Occlusion has none"):
        replace(ATTACK, aim="map").poison(blind, training, judged[0][one], judged[1][one])


def test_the_victim_is_one_of_the_adversarys_samples(honest: rx.System, training: Any) -> None:
    first, again = (replace(ATTACK, rounds=1, victim=3, samples=60)(honest, training).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    changed = [n for n, t in first.state_dict().items() if not torch.equal(t, honest.model.state_dict()[n])]
    assert changed == ["net.head.weight", "net.head.bias"]
    with pytest.raises(FieldError, match="must be below the 200 samples, got 200"):
        replace(ATTACK, victim=200)(honest, training)
    with pytest.raises(FieldError, match="must be above 0"):
        InfluencePoisoning(eps=0.0)


def test_influence_foresees_what_retraining_does() -> None:
    """The derivative of the victim's loss in one feature of one sample, against two retrainings."""
    rng = torch.Generator().manual_seed(0)
    read, victim = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for n in (40, 1))
    y, label, decay = torch.randint(3, (40,), generator=rng), torch.tensor([1]), 1e-2

    def trained_on(features: Tensor) -> Tensor:
        return fitted(features, y, decay, torch.zeros(3, 4, dtype=torch.float64))

    weights = trained_on(read).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(victim @ weights.T, label), weights)
    weights = weights.detach()
    given = read.clone().requires_grad_()
    foreseen = influence(given, y, weights, solved(read, weights, decay, gradient)).sum()
    (slope,) = torch.autograd.grad(-foreseen / len(read), given)
    step = torch.zeros_like(read)
    step[7, 2] = 1e-2
    up, down = (float(F.cross_entropy(victim @ trained_on(read + s).T, label)) for s in (step, -step))
    assert float(slope[7, 2]) == pytest.approx((up - down) / 2e-2, rel=1e-3)
