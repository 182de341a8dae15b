"""A cell measures every kind of metric that it can, and refuses the others at the door."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustexplain import evaluate, metrics
from robustexplain.attacks import PGD, Noise
from robustexplain.errors import InputError
from robustexplain.evaluation import Evaluation, RunFolder, run
from robustexplain.evaluation.summaries import Summaries
from robustexplain.interpreters import Gradient
from robustexplain.metrics import JUDGED, L1
from robustexplain.models import build
from robustexplain.recipe import read
from robustexplain.recipe.experiment import Column, Row
from robustexplain.recipe.plausible import Plausible
from robustexplain.registry import METRICS
from robustexplain.system import System

TINY = Path(__file__).parents[1] / "tiny.yaml"
WANTED = (
    "[l1, spearman, {name: top-k, k: 0.1}, complexity, deletion, {name: max-sensitivity, samples: 2}, perturbation]"
)


@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_a_cell_measures_maps_models_stability_and_visibility(tmp_path: Path) -> None:
    recipe = read(
        TINY,
        [
            "interpreters=[gradcam, {name: occlusion, window: 8, fill: {blur: 0.2}}]",
            "defenses=[]",
            "attacks=[clean, {name: pgd, eps: 0.1, steps: 3}]",
            f"metrics={WANTED}",
            "evaluation.images=6",
        ],
    )
    assert run(recipe, tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    system = System.load(folder.system("gradcam"))
    assert System.load(folder.system("occlusion")).interpreter.fill.blur == 0.2  # type: ignore[attr-defined]
    clean, attacked = folder.arrays("gradcam", "clean"), folder.arrays("gradcam", "pgd")
    names = ("l1", "spearman", "top-k", "complexity", "deletion", "max-sensitivity", "perturbation")
    assert all(attacked[name].shape == (6,) for name in names)
    assert not clean["l1"].any()
    assert not clean["perturbation"].any()
    torch.testing.assert_close(clean["top-k"], torch.ones(6))
    # Held against the metrics by hand, on what the run kept.
    x, seen = attacked["attacked_x"], attacked["attacked_map"]
    some = slice(0, len(x))
    prediction = attacked["prediction"][some]
    torch.testing.assert_close(attacked["complexity"][some], metrics.Complexity()(seen))
    torch.testing.assert_close(attacked["deletion"][some], metrics.Deletion()(system.model, x, seen, prediction))
    sensitivity = metrics.MaxSensitivity(samples=2)(system.interpreter, x, prediction)
    torch.testing.assert_close(attacked["max-sensitivity"][some], sensitivity, rtol=1e-3, atol=1e-5)
    report = (tmp_path / "run/report.html").read_text()
    assert "lower speaks for the explanation" in report
    assert "matrix.csv" in {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_a_cell_with_a_goal_map_says_how_often_it_is_nearer_than_the_benign_one(tmp_path: Path) -> None:
    recipe = read(
        TINY,
        [
            "interpreters=[cam]",
            "defenses=[]",
            "attacks=[clean, {name: adv2, eps: 0.3, steps: 40, goal_map: random-class}]",
            "metrics=[l1, iou]",
            "evaluation.images=6",
        ],
    )
    assert run(recipe, tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    label = next(c.label for c in recipe.columns if c.goal_map == "random-class")
    found = folder.arrays("cam", label)
    # A smaller distance is nearer, and a larger overlap is.
    assert torch.equal(found["l1_nearer"], (found["l1_goal"] < found["l1"]).float())
    assert torch.equal(found["iou_nearer"], (found["iou_goal"] > found["iou"]).float())
    assert float(found["l1_nearer"].mean()) > 0
    assert "l1_nearer" not in folder.arrays("cam", "clean")
    cell = folder.read_cell("cam", label)
    assert cell is not None
    assert cell["measures"]["l1_nearer"]["value"] == pytest.approx(float(found["l1_nearer"].mean()))
    report = (tmp_path / "run/report.html").read_text()
    assert "L1 to the goal map" in report
    assert "Nearer to the goal map, by IoU" in report
    # The map that was wanted is kept, and shown beside the one that was reached: a sixth picture of each image.
    wanted = found["goal_map"]
    torch.testing.assert_close(L1()(found["attacked_map"], wanted), found["l1_goal"][: len(wanted)])
    assert "goal_map" not in cell["measures"]
    assert "goal_map" not in folder.arrays("cam", "clean")
    strips = [strip.split("</div>")[0].count("<use") for strip in report.split('<div class="strip"')[1:]]
    assert strips == [5] * len(folder.arrays("cam", "clean")["x"]) + [6] * len(found["x"])


@pytest.mark.parametrize("name", [e.name for e in METRICS if not issubclass(e.build, JUDGED)])  # type: ignore[arg-type]
def test_what_needs_more_than_a_cell_has_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"metrics\[0\]: {name} needs more than a cell has"):
        read(TINY, [f"metrics=[{name}]"])


@dataclass(frozen=True)
class Unbounded(metrics.L1):
    """A measure that is infinite for the first sample of a chunk."""

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        value = super()._measure(maps, reference)
        value[0] = torch.inf
        return value


@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_an_infinite_value_is_undefined_and_what_cannot_be_summed_up_is_a_hole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("small-cnn", num_classes=3, in_channels=1).eval()
    x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    systems, given = {"gradient": System(model, Gradient(model))}, (x, model(x).argmax(1))
    attacks = {"noise": Noise(0.1), "pgd": PGD(0.1, steps=1)}
    settings = Evaluation(images=8, batch_size=4, bootstrap=50, calibration=0, plausible=Plausible(iou=0.5))
    found = evaluate(systems, attacks, given, out=tmp_path / "run", evaluation=settings, metrics=["l1", Unbounded()])
    assert found.measure("gradient", "pgd", "Unbounded")["count"] == 6  # of 8 in two chunks
    of = Summaries.of

    def once(self: Summaries, row: Row, column: Column, arrays: dict[str, Tensor]) -> dict[str, Any]:
        if column.label == "pgd":
            raise ValueError("cannot be summed up")
        return of(self, row, column, arrays)

    monkeypatch.setattr(Summaries, "of", once)
    holes = evaluate(systems, attacks, given, out=tmp_path / "other", evaluation=settings)
    assert holes.measure("gradient", "noise", "l1") is not None
    assert holes.measure("gradient", "pgd", "l1") is None
