"""Planted goals: attacks that work find them, attacks without a gradient do not, and are told apart by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ADV2, PGD, Adaptation, Auto, GhorbaniTopK, MapPGD
from robustexplain.errors import InputError
from robustexplain.evaluation.planted import PROVEN, plant, prove
from robustexplain.interpreters import GradCAM, Gradient
from robustexplain.metrics import L1

from .fakes import Rounding

EPS = 0.125
Images = tuple[Tensor, Tensor]


def test_goals_are_maps_of_the_system_in_the_ball_that_keep_the_prediction(trained: nn.Module, judged: Images) -> None:
    x, system = judged[0][:12], rx.System(trained, GradCAM(trained))
    planted = plant(system, x, EPS)
    assert len(planted.rows) >= 10
    torch.testing.assert_close(planted.x, x[planted.rows])
    with torch.no_grad():
        benign = system(planted.x)
    assert torch.equal(planted.prediction, benign.prediction)
    torch.testing.assert_close(planted.start, L1()(planted.maps, benign.maps))
    assert bool((planted.start > 0).all())
    alone = plant(system, x[planted.rows[3:4]], EPS)
    torch.testing.assert_close(alone.maps, planted.maps[3:4], atol=1e-5, rtol=1e-4)


def test_the_map_as_shown_is_found_and_a_rectified_gradient_without_a_surrogate_is_not(
    trained: nn.Module, judged: Images
) -> None:
    x = judged[0][:8]
    system = rx.System(trained, GradCAM(trained))
    proof = prove(MapPGD(EPS, steps=60), system, plant(system, x, EPS))
    assert proof is not None
    assert proof.proven
    assert proof.summary() == {"found": proof.share.as_dict(), "proven": True}
    system = rx.System(trained, Gradient(trained))
    planted = plant(system, x, EPS)
    blind = prove(ADV2(EPS, steps=30, surrogate="none"), system, planted)
    assert blind is not None
    assert int(blind.found.sum()) == 0
    assert blind.summary()["flag"] == "attack not proven"
    assert blind.share.high is not None
    assert blind.share.high < PROVEN


@pytest.mark.filterwarnings("ignore:the attack moves nowhere")
def test_behind_an_unknown_quantiser_only_a_straight_way_finds_anything(
    trained: nn.Module, judged: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Rounding(trained).eval()
    system = rx.System(model, GradCAM(model))
    planted = plant(system, judged[0][:6], EPS)
    for attack in (ADV2(EPS, steps=20), MapPGD(EPS, steps=20), MapPGD(EPS, steps=20, random_start=True)):
        proof = prove(attack, system, planted)
        assert proof is not None
        assert int(proof.found.sum()) == 0
    straight = prove(MapPGD(EPS, steps=60, adapt=Adaptation(straight=True)), system, planted)
    assert straight is not None
    assert int(straight.found.sum()) >= 3


def test_auto_is_asked_to_match_and_stops_at_half_the_distance(
    trained: nn.Module, judged: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustexplain.attacks.joint.auto.STEPS", 30)
    system = rx.System(trained, GradCAM(trained))
    planted = plant(system, judged[0][:6], EPS)
    proof = prove(Auto(EPS, "move"), system, planted)
    assert proof is not None
    assert proof.proven
    assert bool((proof.distance <= 0.5).all())


def test_attacks_without_a_goal_map_and_inputs_without_a_grid_have_no_proof(trained: nn.Module, judged: Images) -> None:
    system = rx.System(trained, GradCAM(trained))
    planted = plant(system, judged[0][:3], EPS)
    assert prove(PGD(EPS), system, planted) is None
    assert prove(GhorbaniTopK(EPS), system, planted) is None
    with pytest.raises(InputError, match="images"):
        plant(system, torch.rand(3, 5), EPS)


def test_nothing_planted_is_nothing_proven(trained: nn.Module, judged: Images) -> None:
    system = rx.System(trained, GradCAM(trained))
    planted = plant(system, judged[0][:3], 0.0)
    assert len(planted.rows) == 0
    proof = prove(MapPGD(EPS, steps=5), system, planted)
    assert proof is not None
    assert not proof.proven
    assert proof.share.value is None


def test_inputs_without_an_alarm_are_planted_where_there_are_any() -> None:
    # Of different inputs: equal ones have equal draws.
    x = 0.5 + 0.01 * torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:4] += 0.4

    def system(given: Tensor) -> rx.Explained:
        brightness = given.flatten(1).mean(1)
        logits = torch.stack([torch.ones(len(given)), torch.zeros(len(given))], 1)
        return rx.Explained(logits, given[:, 0], brightness, brightness > 0.505)

    planted = plant(system, x, 0.25)  # type: ignore[arg-type]
    assert planted.rows.tolist() == list(range(24))
    assert bool(planted.alarm[:4].all())  # nothing in their ball is quiet
    assert float(planted.alarm[4:].float().mean()) <= 0.15  # of one draw about half would ring
