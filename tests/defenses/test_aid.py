"""Adversarial interpretation distillation: what it claims, its terms, and within other interpreters."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import robustexplain as rx
from robustexplain.attacks import ADV2, random_classes
from robustexplain.data import Data, take
from robustexplain.defenses import (
    AID,
    AggregatedInterpreter,
    BetaSmoothing,
    ConsistentAID,
    Defense,
    InputTransform,
    KernelSmoothing,
)
from robustexplain.defenses.interpreters.aid import AIDLoss, OwnNetworks, maskers
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import RTS, GradCAM, MaskingModel, MaskObjective
from robustexplain.models import Classifier
from robustexplain.registry import DEFENSES
from robustexplain.training import Training, TrainingStep
from robustexplain.transforms import Brightness, HarmlessChange, UniformNoise

EPS = 0.125
# On so little training the masks stay all ones, unless their size weighs more.
SMALL = MaskObjective(average=10.0)
INNER = ADV2(EPS, steps=8, step_size=0.03, warm_start=0.5)
NOW = TrainingStep(0, 0, 0.0)
NOISE: tuple[HarmlessChange, ...] = (UniformNoise(1 / 16),)


def loss_of(settings: AID, trained: Classifier, rts: RTS, changes: tuple[HarmlessChange, ...] = NOISE) -> AIDLoss:
    networks = OwnNetworks(RTS(trained, copy.deepcopy(rts.masker))).requires_grad_(True)
    return AIDLoss(settings, networks, changes)


def shift(system: rx.System, x: Tensor, y: Tensor, moved: Tensor, goal: Tensor) -> float:
    with torch.no_grad():
        return float((system.interpreter(moved, goal) - system.interpreter(x, y)).abs().mean())


def test_with_aid_an_attack_changes_the_map_and_with_its_third_term_noise_changes_it_less(
    trained: Classifier, rts: RTS, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:16], judged[1][:16]
    system, goal = rx.System(trained, rts), random_classes(x, y, 10)
    made = replace(INNER, steps=20)(system, x, y, goal)
    assert float(made.success.float().mean()) > 0.9
    aid = AID(attack=INNER, objective=SMALL, training=Training(epochs=3, batch_size=20, lr=4e-3))
    consistent = replace(aid, harmless_weight=12.0, harmless=NOISE)
    plain, after = (defense(system, take(digits.defense, 120)) for defense in (aid, consistent))
    assert float(rts(x, y).std((1, 2)).mean()) > 0.1, "the masks say nothing"
    forged = [shift(s, x, y, made.x, goal) for s in (system, plain, after)]
    noisy = [shift(s, x, y, UniformNoise(1 / 16)(x, seed=5), y) for s in (system, plain, after)]
    print(f"forged inputs move the map by {forged}, noise by {noisy} (RTS, AID, with its third term)")
    assert forged[1] > 1.5 * forged[0]
    assert noisy[2] < 0.6 * noisy[1]
    assert forged[2] / noisy[2] > forged[1] / noisy[1]


def test_its_terms_are_mean_distances_of_the_maps(trained: Classifier, rts: RTS, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:8], judged[1][:8]
    settings = AID(weight=2.5, attack=INNER, harmless_weight=1.5)
    without, with_it = (
        loss_of(s, trained, rts) for s in (replace(settings, weight=0.0, harmless_weight=0.0), settings)
    )
    forged, goal = with_it.attacked(x, y, NOW)
    masker = copy.deepcopy(rts.masker).train()
    (benign, _), (moved, _) = masker(x, y), masker(forged, goal)
    seen: list[Tensor] = []
    handle = with_it.networks.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    found = with_it(with_it.networks, x, y, NOW)
    handle.remove()
    harmless = seen[-1][16:]
    assert 0 < float((harmless - x).abs().amax()) <= 1 / 16 + 1e-6
    still, _ = masker(harmless, y)
    expected = -2.5 * (benign - moved).abs().mean((1, 2)) + 1.5 * (benign - still).abs().mean((1, 2))
    torch.testing.assert_close(found - without(without.networks, x, y, NOW), expected, rtol=1e-3, atol=1e-4)


def test_in_the_papers_alternation_each_step_has_one_of_the_losses(
    trained: Classifier, rts: RTS, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:6], judged[1][:6]
    settings = AID(weight=2.0, attack=INNER)
    both, turns, neither = (
        loss_of(s, trained, rts) for s in (settings, replace(settings, alternate=True), replace(settings, weight=0.0))
    )
    even, odd = (turns(turns.networks, x, y, replace(NOW, number=n)) for n in (4, 5))
    torch.testing.assert_close(even, neither(neither.networks, x, y, NOW), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(even + odd, both(both.networks, x, y, NOW), rtol=1e-4, atol=1e-4)
    assert float(odd.detach().max()) < 0
    odd.mean().backward()
    # Data-parallel training waits for a gradient of every weight.
    assert all(p.grad is not None for p in turns.networks.parameters())


def test_its_attacked_inputs_do_not_depend_on_their_place_in_the_batch(
    trained: Classifier, rts: RTS, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:6].double(), judged[1][:6]
    double = RTS(copy.deepcopy(trained).double(), copy.deepcopy(rts.masker).double())
    loss = AIDLoss(AID(attack=INNER), OwnNetworks(double), ())
    moment = TrainingStep(3, 1, 0.5)
    whole, goal = loss.attacked(x, y, moment)
    order = torch.tensor([4, 0, 5])
    some, some_goal = loss.attacked(x[order], y[order], moment)
    assert torch.equal(goal[order], some_goal)
    torch.testing.assert_close(some, whole[order], rtol=0, atol=1e-9)
    later, _ = loss.attacked(x, y, replace(moment, epoch=2))
    assert not torch.equal(later, whole)


@pytest.mark.parametrize(
    "around",
    [
        BetaSmoothing(),
        AggregatedInterpreter(["rts", "gradcam"]),
        InputTransform(("median-2",), explained="transformed"),
    ],
    ids=["smoothed", "aggregate", "transformed"],
)
def test_it_trains_the_network_within_other_interpreters(
    around: Defense, trained: Classifier, rts: RTS, few: Dataset[Any], judged: tuple[Tensor, Tensor]
) -> None:
    system = around(rx.System(trained, rts))
    before = copy.deepcopy(rts.masker.state_dict())
    aid = AID(attack=replace(INNER, steps=2), training=Training(epochs=1, batch_size=20))
    hardened = aid(system, few)
    assert hardened.model is system.model
    assert type(hardened.interpreter) is type(system.interpreter)
    (old,), (new,) = (maskers(s.interpreter) for s in (system, hardened))
    assert old is rts.masker
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())
    assert not torch.equal(new.draw.weight, old.draw.weight)
    assert not any(p.requires_grad for p in new.parameters())
    x = judged[0][:3]
    assert not torch.equal(hardened(x).maps, system(x).maps)


def test_a_masker_around_the_very_classifier_is_trained_as_a_copy(
    trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor]
) -> None:
    shared = RTS(trained, MaskingModel.around(trained, judged[0], width=4, levels=2).eval())
    before = [p.clone() for p in trained.parameters()]
    found = AID(attack=replace(INNER, steps=2), training=Training(epochs=1, batch_size=20))(
        rx.System(trained, shared), few
    )
    assert found.model is trained
    assert all(map(torch.equal, before, trained.parameters()))


def test_it_refuses_what_it_cannot_train(trained: Classifier, rts: RTS, few: Dataset[Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="AID trains the interpreter's own network, and GradCAM has none"):
        AID()(rx.System(trained, GradCAM(trained)), few)
    around = KernelSmoothing(samples=2)(rx.System(trained, rts))
    with pytest.raises(UnsupportedModelError, match="not train through KernelSmoothed: apply aid to the RTS first"):
        AID()(around, few)
    with pytest.raises(InputError, match=r"attack\.eps must be above 0"):
        AID(attack=ADV2(0.0))
    with pytest.raises(InputError, match="harmless_weight must be at least 0"):
        AID(harmless_weight=-1.0)
    assert DEFENSES.get("aid-consistent").build is ConsistentAID
    assert ConsistentAID(harmless=(Brightness(),)).name == "aid-consistent"
