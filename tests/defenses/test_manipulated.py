"""Scanners of models whose owner may lie, and the repair, on a small network trained on digits."""

from __future__ import annotations

import copy
import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import robustexplain as rx
from robustexplain.attacks.manipulation import LocationFooling
from robustexplain.cli import app
from robustexplain.data import Data, take
from robustexplain.defenses.manipulated import (
    FinePruning,
    GradientFreeDisagreement,
    MapTrigger,
    ModelScanner,
    NeuralCleanse,
    Scan,
    TrustedReference,
    agreement,
    invert,
    p_values,
)
from robustexplain.defenses.manipulated.fine_pruning import kept_features
from robustexplain.defenses.manipulated.triggers import anomaly
from robustexplain.errors import FieldError, InputError, NotDifferentiableError, ZeroMapGradientWarning
from robustexplain.evaluation.scanning import run_scans
from robustexplain.interpreters import CAM, GradCAM, Gradient, Occlusion, Reference, SHAPTabular
from robustexplain.metrics import auc
from robustexplain.models import Classifier, build
from robustexplain.recipe import check
from robustexplain.registry import SCANNERS
from robustexplain.training import Session, Training


@pytest.fixture(scope="module")
def honest(trained: Classifier) -> rx.System:
    return rx.System(trained, GradCAM(trained))


@pytest.fixture(scope="module")
def fooled(honest: rx.System, digits: Data) -> rx.System:
    training = Training(epochs=10, batch_size=32, lr=2e-3, weight_decay=0)
    return LocationFooling(weight=10, training=training, budget=0.05)(honest, take(digits.defense, 160))


@pytest.fixture(scope="module")
def probe(digits: Data) -> Any:
    return take(digits.defense, 12, seed=3)


# Scanners


@pytest.fixture(scope="module")
def table() -> tuple[rx.System, TensorDataset]:
    rows = torch.rand(40, 4, generator=torch.Generator().manual_seed(2))
    model = build("linear", in_features=4, num_classes=2)
    return rx.System(model, SHAPTabular(model, Reference(rows[:10]))), TensorDataset(rows, (rows[:, 0] > 0.5).long())


@pytest.mark.parametrize("entry", list(SCANNERS), ids=lambda entry: entry.name)
def test_a_scan_repeats_and_leaves_the_system_alone(
    entry: Any, honest: rx.System, probe: Any, table: tuple[rx.System, TensorDataset]
) -> None:
    if entry.build.takes == ("tables",):
        honest, probe = table
    small = {"steps": 3} if hasattr(entry.build, "steps") else {}
    scanner: ModelScanner = entry.build(probe=8, **small)
    before = copy.deepcopy(honest.model.state_dict())
    flags = [p.requires_grad for p in honest.model.parameters()]
    state = torch.get_rng_state()
    first, second = (scanner(honest, probe, honest) for _ in range(2))
    assert isinstance(first, Scan)
    assert first == second
    assert torch.isfinite(torch.tensor(first.score))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), honest.model.state_dict().values(), strict=True))
    assert [p.requires_grad for p in honest.model.parameters()] == flags
    assert all(p.grad is None for p in honest.model.parameters())
    with pytest.raises(InputError, match="needs clean samples, got none"):
        scanner(honest, take(probe, 0), honest)
    own, other, shape = ("tables", "images", (1, 8, 8)) if honest is table[0] else ("images", "tables", (5,))
    with pytest.raises(InputError, match=f"takes {own}, got {other}"):
        scanner(honest, TensorDataset(torch.rand(4, *shape), torch.arange(4)), honest)  # type: ignore[arg-type]


def test_a_fooled_model_is_more_suspicious_than_the_honest_one(
    honest: rx.System, fooled: rx.System, probe: Any
) -> None:
    """Both comparisons see Heo et al.'s location fooling, which keeps every prediction."""
    scanners = (GradientFreeDisagreement(), GradientFreeDisagreement("rise", samples=200), TrustedReference())
    for scanner in scanners:
        apart = scanner(fooled, probe, honest).score - scanner(honest, probe, honest).score
        assert apart > 0.1, scanner


def test_an_owner_who_knows_the_scans_lies_less_or_unseen(
    honest: rx.System, fooled: rx.System, digits: Data, probe: Any
) -> None:
    """The score comes near the honest one, on samples that the owner does not have."""
    training = Training(epochs=10, batch_size=32, lr=2e-3, weight_decay=0)
    for scanner, name in (
        (GradientFreeDisagreement(), "gradient-free-disagreement"),
        (TrustedReference(), "trusted-reference"),
    ):
        attack = LocationFooling(weight=10, training=training, budget=0.05, evade=(name,), evade_weight=20)
        aware = attack(honest, take(digits.defense, 160))
        level, seen, evading = (scanner(s, probe, honest).score for s in (honest, fooled, aware))
        assert abs(evading - level) < 0.6 * abs(seen - level), name


def test_a_method_without_gradients_agrees_with_itself(trained: Classifier, probe: Any) -> None:
    occluded = rx.System(trained, Occlusion(trained, of="logit"))
    assert GradientFreeDisagreement()(occluded, probe).score == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(NotDifferentiableError, match="map-trigger follows the map's gradient, and Occlusion has none"):
        MapTrigger(2)(occluded, probe)


def test_a_reference_is_needed_and_only_what_both_predict_alike_is_compared(
    honest: rx.System, probe: Any, trained: Classifier
) -> None:
    with pytest.raises(InputError, match="compares with a trusted system: give it a reference"):
        TrustedReference()(honest, probe)
    found = TrustedReference()(honest, probe, honest)
    assert found.score == pytest.approx(0.0, abs=1e-6)
    assert found.figures["alike"] == 1.0


def test_agreement_compares_places_and_gives_zero_to_a_flat_map() -> None:
    maps = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    assert agreement(maps, -2 * maps, 7).tolist() == pytest.approx([1.0] * 3)
    assert agreement(maps, torch.ones(3, 14, 14), 7).tolist() == [0.0] * 3
    # Inside a cell pixels may change places.
    mixed = maps.reshape(3, 7, 2, 7, 2).flip(2).reshape(3, 14, 14)
    assert agreement(maps, mixed, 7).tolist() == pytest.approx([1.0] * 3)
    assert agreement(maps, mixed, 14).max() < 0.9


# Trigger inversion


class Planted(nn.Module):
    """Three classes; a bright pixel in the corner decides for class 1, whatever else is there."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 4:, :].mean((1, 2)), 8 * x[:, 0, 0, 0] - 7, x[:, 0, :, 4:].mean((1, 2))], 1)


def planted_images() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    x = 0.5 * torch.rand(16, 1, 8, 8, generator=rng)
    x[:8, :, 4:] += 0.3
    x[8:, :, :, 4:] += 0.3
    return x


def test_inversion_finds_a_planted_trigger_of_one_pixel() -> None:
    model, x = Planted().eval(), planted_images()
    wanted = torch.ones(16, dtype=torch.int64)

    def aim(z: Tensor) -> tuple[Tensor, bool]:
        logits = model(z)
        return nn.functional.cross_entropy(logits, wanted), bool((logits.argmax(1) == 1).all())

    found = invert(x, aim, 300, 0)
    assert found.worked
    assert (model(found.on(x)).argmax(1) == 1).all()
    assert found.mask[0, 0] > 0.5
    assert found.pattern[0, 0, 0] > 0.7
    assert found.size < 0.05
    assert invert(x, lambda z: (z.sum() * 0, False), 3, 0).size == 1.0


class Moving(nn.Module):
    """Two classes, by the mean of the left half; where ``moves``, a bright corner makes it that of the right half."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.moves = moves

    def forward(self, x: Tensor) -> Tensor:
        turn = x[:, 0, 0, 0] if self.moves else 0
        score = (1 - turn) * x[:, 0, :, :4].mean((1, 2)) + turn * x[:, 0, :, 4:].mean((1, 2)) - 0.5
        return torch.stack([score, -score], 1)


def test_a_trigger_that_moves_the_map_and_keeps_the_label_is_found() -> None:
    x = torch.full((8, 1, 8, 8), 0.2)
    x[4:] = 0.8
    x[:, 0, 0, 0] = 0.0
    data: Any = TensorDataset(x, torch.arange(8) // 4)
    honest, planted = (
        MapTrigger(100, probe=8)(rx.System(model, Gradient(model, of="logit")), data)
        for model in (Moving(False).eval(), Moving(True).eval())
    )
    assert honest.score == pytest.approx(0.0, abs=1e-6)
    assert planted.score > 0.8


def test_a_scan_that_the_map_does_not_lead_says_so(trained: Classifier, digits: Data) -> None:
    """On rectifiers the map of a gradient has no derivative: the search is led by the labels alone."""
    with pytest.warns(ZeroMapGradientWarning, match="derivative of the map, and that of Gradient has 0.0% of"):
        MapTrigger(2, probe=8)(rx.System(trained, Gradient(trained, of="logit")), digits.defense)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZeroMapGradientWarning)
        MapTrigger(2, probe=8)(rx.System(trained, CAM(trained)), digits.defense)


def test_neural_cleanse_names_the_planted_class() -> None:
    model = Planted().eval()
    system = rx.System(model, GradCAMFree(model))
    found = NeuralCleanse(steps=200, probe=16)(system, TensorDataset(planted_images(), torch.arange(16) % 3))  # type: ignore[arg-type]
    assert found.figures["target"] == 1
    index, target = anomaly(torch.tensor([10.0, 11.0, 1.0, 9.0, 10.5]))
    assert target == 2
    assert index == pytest.approx(9.0 / (1.4826 * 0.5 * 2))
    assert anomaly(torch.ones(4)) == (0.0, 0)


def GradCAMFree(model: nn.Module) -> Occlusion:
    """Any interpreter: the scan of labels does not ask it."""
    return Occlusion(model)


# What scores mean


def test_p_values_count_honest_models() -> None:
    honest = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert p_values(honest, torch.tensor([0.5, 0.3, 0.0])).tolist() == pytest.approx([0.2, 0.6, 1.0])
    draws = torch.rand(2000, 20, generator=torch.Generator().manual_seed(0))
    alarms = torch.cat([p_values(row[1:], row[:1]) for row in draws]) <= 0.1
    assert 0.08 < float(alarms.double().mean()) < 0.12
    with pytest.raises(InputError, match="NaN"):
        p_values(honest * torch.nan, honest)


# Repair


def test_a_short_clean_fine_tuning_brings_the_honest_map_back(
    honest: rx.System, fooled: rx.System, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged
    repaired = FinePruning(share=0.0, training=Training(epochs=4, batch_size=32, lr=2e-3, weight_decay=0))(
        fooled, take(digits.defense, 300, seed=1)
    )
    with torch.no_grad():
        wanted = honest.interpreter(x, y)
        before, after = (agreement(s.interpreter(x, y), wanted, 7).mean() for s in (fooled, repaired))
        assert after > before + 0.1
        assert (repaired.model(x).argmax(1) == y).float().mean() > 0.85


def test_features_that_were_cut_off_stay_so(honest: rx.System, digits: Data) -> None:
    few = take(digits.defense, 64)
    pruned = FinePruning(share=0.25, training=Training(epochs=1, batch_size=16, lr=1e-2))(honest, few)
    head: Tensor = pruned.model.get_submodule("net.head").weight  # type: ignore[assignment]
    gone = (head == 0).all(0)
    assert int(gone.sum()) == int(0.25 * head.shape[1])
    untouched: Tensor = honest.model.get_submodule("net.head").weight  # type: ignore[assignment]
    assert not torch.equal(head[:, ~gone], untouched[:, ~gone])
    with pytest.raises(FieldError, match="must be below 1"):
        FinePruning(share=1.0)


def test_the_least_active_features_go() -> None:
    head = nn.Linear(4, 2)
    model = nn.Sequential(nn.Flatten(), head).eval()
    x = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.8, 0.3, 0.5, 0.1]])[:, None, :, None]
    assert kept_features(model, head, x, 0.5).tolist() == [1, 0, 1, 0]
    assert kept_features(model, head, x, 0.01).tolist() == [1, 1, 1, 0], "one at least"
    alone = nn.Linear(1, 2)
    with pytest.raises(InputError, match="one feature at least"):
        kept_features(nn.Sequential(nn.Flatten(), alone).eval(), alone, x[:, :, :1], 0.5)


# In a recipe


@pytest.fixture
def tree() -> dict[str, Any]:
    training = {"epochs": 3, "batch_size": 16, "lr": 5e-3}
    return {
        "name": "scanned",
        "data": "digits",
        "model": {"name": "small-cnn", "train": {"epochs": 2, "batch_size": 64, "lr": 1e-2}},
        "interpreters": ["gradcam"],
        "manipulations": [
            {
                "name": "location-fooling",
                "label": "lie",
                "of": "gradcam",
                "samples": 60,
                "weight": 30,
                "budget": 1.0,
                "training": training,
            }
        ],
        "defenses": [
            {"name": "fine-pruning", "label": "repaired", "of": "lie", "samples": 32},
            {"name": "fine-pruning", "label": "only trained on", "of": "gradcam", "share": 0, "samples": 32},
            {"name": "input-transform", "of": "gradcam"},
        ],
        "attacks": ["clean"],
        "scan": {
            "models": 2,
            "probe": 8,
            "scanners": [{"name": "trusted-reference", "probe": 8}, {"name": "gradient-free-disagreement", "probe": 4}],
        },
    }


def test_a_recipe_scans_honest_manipulated_and_repaired_models_and_goes_on(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    words = ["scan", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = list(csv.DictReader((tmp_path / "run" / "scans.csv").open()))
    assert [(line["row"], line["scanner"]) for line in lines] == [
        (row, scanner)
        for row in ("gradcam", "lie", "repaired", "only trained on")
        for scanner in ("trusted-reference", "gradient-free-disagreement")
    ]
    assert {line["models"] for line in lines} == {"2"}
    assert [line["agreement_with_honest"] for line in lines[:2]] == ["1", "1"]
    assert lines[0]["auc"] == ""
    assert 0 <= float(lines[2]["auc"]) <= 1
    # Beside the honest models stand those that were honestly trained on; of these and of honest ones nothing is asked.
    kept = {p.stem: json.loads(p.read_text())["scans"] for p in (tmp_path / "run" / "scans").glob("*.json")}
    of = {
        row: torch.tensor([kept[name]["trusted-reference"]["score"] for name in kept if name.startswith(start)])
        for row, start in (("lie", "lie"), ("control", "only-trained-on"))
    }
    assert float(lines[2]["auc_controls"]) == pytest.approx(auc(of["control"], of["lie"]))
    assert [line["row"] for line in lines if line["auc_controls"]] == ["lie", "lie", "repaired", "repaired"]
    assert "AUC against controls" in (tmp_path / "run" / "scans.html").read_text()
    assert "AUC over models" in (tmp_path / "run" / "scans.html").read_text()
    assert (tmp_path / "run" / "scans.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is scanned again.
    monkeypatch.setattr(TrustedReference, "_scan", lambda *_: pytest.fail("scanned again"))
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    said = [output[output.index("gradcam: trusted-reference") :] for output in (done.output, again.output)]
    assert said[0] == said[1]


def test_mistakes_in_a_recipes_scan_are_named(tree: dict[str, Any]) -> None:
    tree["scan"]["scanners"] = ["map-triger"]
    with pytest.raises(InputError, match=r"scan\.scanners\[0\]\.name: unknown scanner 'map-triger'; did you mean"):
        check(tree)
    tree["scan"]["scanners"] = [{"name": "map-trigger", "steps": 0}]
    with pytest.raises(InputError, match=r"scan\.scanners\[0\]\.steps"):
        check(tree)
    tree["scan"] = {"scanners": ["map-trigger", "map-trigger"]}
    with pytest.raises(InputError, match="two are called 'map-trigger'"):
        check(tree)
    tree["scan"] = {"modles": 3}
    with pytest.raises(InputError, match=r"scan\.modles"):
        check(tree)


def test_tables_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("a,b,y\n" + "".join(f"{i % 7},{i % 3},{i % 2}\n" for i in range(60)))
    recipe = check(
        {
            "name": "rows",
            "data": {"name": "csv-table", "path": str(table), "target": "y"},
            "model": {"name": "mlp", "train": {"epochs": 1}},
            "interpreters": ["gradient"],
            "attacks": ["clean"],
            "scan": {"models": 2, "scanners": ["gradient-free-disagreement"]},
        }
    )
    with pytest.raises(InputError, match=r"scan\.scanners: gradient-free-disagreement takes images, got tables"):
        run_scans(recipe, tmp_path / "run", Session())
    assert not (tmp_path / "run").exists()
