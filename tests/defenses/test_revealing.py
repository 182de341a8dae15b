"""Revealing training: what it claims, the terms of its loss, resuming, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain import maps as ops
from robustexplain.attacks import ADV2, MapPGD, random_classes
from robustexplain.data import Data, take
from robustexplain.defenses import Revealing
from robustexplain.defenses.models.forger import Forger, apart
from robustexplain.defenses.models.revealing_loss import RevealingLoss
from robustexplain.errors import InputError, NotDifferentiableError, RunMismatchError, UnsupportedModelError
from robustexplain.interpreters import CAM, GradCAM
from robustexplain.metrics import L1, auc
from robustexplain.models import Classifier
from robustexplain.training import Session, Training, TrainingStep, histories
from robustexplain.transforms import UniformNoise

EPS = 0.125
INNER = ADV2(EPS, steps=8, step_size=0.03, warm_start=0.5)
NOW = TrainingStep(3, 1, 0.5)
CHEAP = Revealing(("cam",), attack=INNER, training=Training(epochs=2, batch_size=20, lr=1e-3, weight_decay=0.0))


def loss_of(settings: Revealing, trained: nn.Module) -> RevealingLoss:
    model = copy.deepcopy(trained).requires_grad_(True)
    forger = Forger.against(model, settings._specs, settings.forgers)
    return RevealingLoss(settings, forger, trained, (UniformNoise(1 / 16),))


def shifts(system: rx.System, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How far ADV2 and noise move the maps."""
    forged = ADV2(EPS, steps=60, weight=50.0)(system, x, y, random_classes(x, y, 10)).x
    with torch.no_grad():
        maps = [system(v).maps for v in (x, forged, UniformNoise(1 / 32)(x, seed=9))]
    return L1()(maps[1], maps[0]), L1()(maps[2], maps[0])


def test_forged_inputs_move_the_maps_of_a_revealing_network_and_noise_does_not(
    trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:32], judged[1][:32]
    before = rx.System(trained, CAM(trained))
    training = Training(epochs=3, batch_size=32, lr=2e-3, weight_decay=0.0)
    after = replace(CHEAP, training=training, harmless=(UniformNoise(1 / 16),))(before, take(digits.train, 320))
    separation = [auc(noise, forged) for forged, noise in (shifts(s, x, y) for s in (before, after))]
    accuracy = [float((s.model(x).argmax(1) == y).float().mean()) for s in (before, after)]
    print(f"separation {separation}, accuracy {accuracy} (plain, revealing)")
    assert separation[0] < 0.6
    assert separation[1] > separation[0] + 0.25
    assert accuracy[1] > accuracy[0] - 0.1


@pytest.mark.parametrize("names", [("cam",), ("cam", "gradcam")])
def test_its_loss_is_the_one_that_is_stated(
    names: tuple[str, ...], trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:6], judged[1][:6]
    settings = replace(CHEAP, interpreters=names, weight=5.0, harmless_weight=7.0, keep=2.0, rise=0.8)
    loss = loss_of(settings, trained)
    # A network that is no longer the one that it began as.
    with torch.no_grad():
        loss.module.model.net.head.weight.mul_(1.3)  # type: ignore[union-attr, operator]
    seen: list[Tensor] = []
    handle = loss.module.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    found = loss(loss.module, x, y, NOW)
    handle.remove()
    forged, goal = loss.forged(x, y, NOW)
    _, attacked, harmless = seen[-1].chunk(3)
    assert torch.equal(attacked, forged)
    model, expected = loss.module.model, torch.zeros(6)
    for name in names:
        explain = {"cam": CAM, "gradcam": GradCAM}[name](model)
        benign, moved, still = (ops.minmax(explain(v, c)) for v, c in ((x, y), (forged, goal), (harmless, y)))
        # The weight has risen to 0.5 / 0.8 of its full value.
        expected = expected + (-5.0 * 0.625 * apart(benign, moved) + 7.0 * apart(benign, still)) / len(names)
    for v in (x, harmless):
        log_p, log_q = model(v).log_softmax(1), trained(v).log_softmax(1)
        kept = (log_q.exp() * (log_q - log_p)).sum(1)
        expected = expected + (F.nll_loss(log_p, y, reduction="none") + 2.0 * kept) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_of_two_forgers_the_one_counts_that_deceives_with_the_nearer_map(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:16], judged[1][:16]
    loss = loss_of(replace(CHEAP, rival=MapPGD(EPS, steps=12)), trained)
    rivals = [loss_of(replace(CHEAP, attack=INNER), trained), loss]
    forged, goal = loss.forged(x, y, NOW)
    first, first_goal = rivals[0].forged(x, y, NOW)
    assert torch.equal(goal, first_goal)
    alone = {bool(torch.equal(a, b)) for a, b in zip(forged, first, strict=True)}
    assert alone == {True, False}, "one of the two is always better"
    with torch.no_grad():
        benign = loss.module(x, y)[1]
        rank = [
            2.0 * (logits.argmax(1) != goal) + apart(benign, maps)
            for logits, maps, _ in (loss.module(v, goal) for v in (forged, first))
        ]
    assert bool((rank[0] <= rank[1] + 1e-6).all())


def test_a_network_whose_maps_are_constant_gets_a_finite_gradient(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    dead = copy.deepcopy(trained)
    with torch.no_grad():
        dead.net.head.weight.zero_()
    loss = loss_of(replace(CHEAP, interpreters=("cam", "gradcam", "gradient")), dead)
    value = loss(loss.module, judged[0][:4], judged[1][:4], NOW)
    value.mean().backward()
    assert bool(value.isfinite().all())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in loss.module.parameters())


@pytest.mark.parametrize("averaged", [0.0, 0.9])
def test_a_killed_training_goes_on_where_it_was(
    averaged: float, trained: Classifier, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, defense = take(digits.train, 40), replace(CHEAP, training=replace(CHEAP.training, ema=averaged))
    whole = defense.hardened(trained, data, Session())
    forged = RevealingLoss.forged

    def killed(loss: RevealingLoss, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, Tensor]:
        if step.number == 3:
            raise KeyboardInterrupt
        return forged(loss, x, y, step)

    with monkeypatch.context() as patch:
        patch.setattr(RevealingLoss, "forged", killed)
        with pytest.raises(KeyboardInterrupt):
            defense.hardened(trained, data, Session(folder=tmp_path))
    assert len(histories(tmp_path)["revealing"]) == 1
    resumed = defense.hardened(trained, data, Session(folder=tmp_path))
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    norms = [name for name in whole.state_dict() if "running" in name]
    assert all(torch.equal(whole.state_dict()[n], trained.state_dict()[n]) for n in norms)
    # Another defense does not go on from its checkpoint.
    with pytest.raises(RunMismatchError):
        replace(defense, harmless=(UniformNoise(),)).hardened(trained, data, Session(folder=tmp_path))


def test_it_refuses_what_it_cannot_train(trained: Classifier, digits: Data) -> None:
    for settings, words in (
        ({"interpreters": ()}, "interpreters must name one at least"),
        ({"interpreters": ("rts",)}, "'rts' is trained"),
        ({"weight": -1.0}, "weight must be at least 0"),
        ({"attack": ADV2(0.0)}, r"attack\.eps must be above 0"),
        ({"rival": MapPGD(0.0)}, r"rival\.eps must be above 0"),
    ):
        with pytest.raises(InputError, match=words):
            Revealing(**settings)  # type: ignore[arg-type]
    for name in ("rise", "mask"):
        with pytest.raises(NotDifferentiableError, match=f"those of '{name}' have no such gradient; .*gradcam"):
            Revealing((name,))
    with pytest.raises(UnsupportedModelError, match="trains the maps of cam, and the system explains by GradCAM"):
        CHEAP(rx.System(trained, GradCAM(trained)), digits.train)
    table = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    rows = TensorDataset(torch.rand(30, 4), torch.arange(30) % 3)
    with pytest.raises(InputError, match=r"forges images \[C, H, W\]"):
        replace(CHEAP, interpreters=("gradient",)).hardened(table, rows)
