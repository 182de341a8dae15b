"""Attacks that miss what is known to be there: marked in a run, and those that find it are not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import attacks, interpreters
from robustexplain.attacks import ADV2, CW, PGD, Auto, DeepFool, MapPGD
from robustexplain.errors import RobustExplainWarning
from robustexplain.evaluation import Evaluation, Results, evaluate
from robustexplain.evaluation.planted_predictions import (
    head_of,
    plant_predictions,
    prove_prediction,
    threat_of,
)
from robustexplain.metrics import hit
from robustexplain.recipe.auditing import Auditing
from robustexplain.transforms import UniformNoise

from .fakes import Rounding

EPS = 0.125
PLANTED = Auditing(planted=True, images=4)
Images = tuple[Tensor, Tensor]


def judged_by(system: Any, columns: dict[str, Any], images: Images, out: Path, audit: Auditing) -> Results:
    settings = Evaluation(
        images=6, batch_size=6, calibration=24, harmless=(UniformNoise(0.02),), bootstrap=50, pictures=1, targeted=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        systems = system if isinstance(system, dict) else {"row": system}
        return evaluate(systems, columns, images, out=out, evaluation=settings, audit=audit)


def unproven(results: Results, column: str) -> str:
    return "; ".join(f["reason"] for f in results.flags("row", column) if f["name"] == "attack-not-proven")


def test_in_a_run_adv2_without_a_surrogate_on_a_rectified_gradient_proves_nothing(
    trained: nn.Module, judged: Images, tmp_path: Path
) -> None:
    blind = ADV2(EPS, steps=10, surrogate="none")
    good = MapPGD(EPS, "move", steps=40)
    columns = {"blind": (blind, "adaptive"), "clean": attacks.Clean(), "good": (good, "adaptive")}
    system = rx.System(trained, interpreters.Gradient(trained))
    results = judged_by(system, columns, judged, tmp_path, PLANTED)
    assert "planted maps (maps that the system shows of some input in the ball) it found 0%" in unproven(
        results, "blind"
    )
    cell = results.cells["row", "blind"]
    assert cell is not None
    assert cell["planted"]["goals"]["found"]["high"] < 0.95
    good_cell = results.cells["row", "good"]
    assert good_cell is not None
    assert good_cell["planted"]["goals"]["found"]["value"] > 0.5
    assert (results.cells["row", "clean"] or {})["planted"] == {}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "attack not proven" in page
    assert "planted maps the attack found 0%" in page


def test_a_defense_that_nobody_hurts_is_suspected_in_a_cheap_audit_too(
    trained: nn.Module, judged: Images, tmp_path: Path
) -> None:
    plain = rx.System(trained, interpreters.Gradient(trained))
    # It draws much noise: what this short search does not reach says nothing.
    noisy = rx.System(trained, interpreters.SmoothGrad(trained, samples=2, sigma=0.3))
    own, unknowing = (ADV2(EPS, steps=2, surrogate="none"), "adaptive"), MapPGD(EPS, steps=2)
    # Who only moves the map wins easily, and says nothing about who forges the prediction.
    mover = (MapPGD(EPS, "move", steps=6), "adaptive")
    systems, cheap = {"plain": plain, "row": (noisy, "plain")}, Auditing(images=4)

    alone = judged_by(systems, {"own": own, "unknowing": unknowing}, judged, tmp_path / "alone", cheap)
    assert "attack not proven" in unproven(alone, "own")
    assert unproven(alone, "unknowing") == ""  # it does not decide: there is one who knows the defense
    assert (alone.cells["plain", "own"] or {})["planted"] == {}
    page = (tmp_path / "alone" / "report.html").read_text(encoding="utf-8")
    assert "No defense can be said to have held" in page

    both = judged_by(systems, {"own": own, "mover": mover}, judged, tmp_path / "both", cheap)
    moved = both.measure("row", "mover", "joint")
    assert moved is not None
    assert moved["value"] > 0.1
    assert "attack not proven" in unproven(both, "own")
    assert unproven(both, "mover") == ""

    off = judged_by(systems, {"own": own}, judged, tmp_path / "off", Auditing(images=4, planted=False))
    assert unproven(off, "own") == ""


def test_in_a_run_an_attack_without_a_straight_way_through_a_quantiser_proves_nothing(
    trained: nn.Module, judged: Images, tmp_path: Path
) -> None:
    model = Rounding(trained).eval()
    system = rx.System(model, interpreters.GradCAM(model))
    straight = PGD(EPS, steps=20, step_size=EPS / 6, adapt=attacks.Adaptation(straight=True))
    columns = {"pgd": PGD(EPS, steps=20, step_size=EPS / 6), "map": MapPGD(EPS, steps=8), "straight": straight}
    results = judged_by(system, columns, judged, tmp_path, PLANTED)
    assert "planted predictions (adversarial examples that are known to exist) it found 0%" in unproven(results, "pgd")
    found = unproven(results, "map")
    assert "planted maps" in found
    assert "planted predictions" in found
    assert unproven(results, "straight") == ""
    assert {"pgd", "map"} == {c for (_, c), why in _doubts(results).items() if "attack not proven" in " ".join(why)}


def _doubts(results: Results) -> dict[tuple[str, str], list[str]]:
    from robustexplain.evaluation.doubts import doubts

    return doubts(results)


def test_honest_attacks_find_planted_predictions_and_random_points_do_not(
    trained: nn.Module, judged: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, system = judged[0][:4], rx.System(trained, interpreters.Gradient(trained))
    monkeypatch.setattr("robustexplain.attacks.joint.auto.STEPS", 8)
    step = {"steps": 15, "step_size": EPS / 5}
    tried: list[attacks.Attack] = [
        PGD(EPS, **step),
        PGD(1.0, steps=40, step_size=0.2, norm="l2"),
        MapPGD(EPS, steps=40),
    ]
    tried += [Auto(EPS, "forge"), DeepFool(), CW(steps=60, search_steps=3, initial_constant=1.0)]
    for attack in tried:
        threat = threat_of(attack, system)
        assert threat is not None
        planted = plant_predictions(system, x, threat)
        assert len(planted.rows) == 4
        with torch.no_grad():
            assert bool((planted.system(planted.star).prediction == 1).all())
            assert bool((planted.system(planted.x).prediction == 0).all())
        assert float(planted.random.float().mean()) <= 0.5
        assert bool(prove_prediction(attack.adapted(planted.system), planted, threat, targeted=False).all()), attack


def test_predictions_are_planted_on_what_a_model_without_a_linear_head_answers(judged: Images) -> None:
    x = judged[0][:4]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 if x.shape[-1] == 8 else x[0].numel(), 12), nn.Softplus()).eval()
    assert head_of(model, x) is None
    planted = plant_predictions(rx.System(model, interpreters.Gradient(model)), x, attacks.Linf(EPS))
    with torch.no_grad():
        assert bool(hit(planted.system.model(planted.star), torch.zeros_like(planted.rows)).all())


def test_what_keeps_the_prediction_or_has_no_ball_has_no_planted_predictions(tiny_model: nn.Module) -> None:
    system = rx.System(tiny_model, interpreters.GradCAM(tiny_model))
    for attack in (attacks.GhorbaniTopK(EPS), Auto(EPS, "move"), attacks.StAdv(), ADV2(EPS)):
        assert threat_of(attack, system) is None
