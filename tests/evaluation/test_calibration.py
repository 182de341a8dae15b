"""Each row is calibrated on harmless changes of inputs that nobody judges: the promised share of them is plausible."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import attacks, interpreters
from robustexplain.attacks import Known
from robustexplain.data import Data, stack
from robustexplain.defenses.detection import Detector
from robustexplain.errors import InputError, RobustExplainWarning
from robustexplain.evaluation import Evaluation, Results, RunFolder, evaluate, run, separation, share
from robustexplain.evaluation.calibration import (
    Calibrator,
    Draws,
    calibrator,
    conformal_quantile,
    distance_of,
    quantile_range,
)
from robustexplain.evaluation.own_data import Inputs
from robustexplain.evaluation.statistics import share_of_draws
from robustexplain.evaluation.summaries import Summaries
from robustexplain.evaluation.words import words_of
from robustexplain.metrics import L1, Cosine, IoU
from robustexplain.random_streams import derive
from robustexplain.recipe import read
from robustexplain.recipe.experiment import Recipe
from robustexplain.recipe.plausible import Plausible
from robustexplain.system import Explained, System
from robustexplain.transforms import UniformNoise

TINY = Path(__file__).parents[1] / "tiny.yaml"
SMALL = [
    "interpreters=[gradient]",
    "defenses=[{name: beta-smoothing, of: gradient}]",
    "attacks=[clean, {name: adv2, eps: 0.1, steps: 4}, {name: ghorbani-topk, eps: 0.1, steps: 4}]",
    "evaluation.calibration=60",
    "evaluation.harmless=[uniform-noise, brightness]",
]


def quiet(recipe: Recipe, root: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        return run(recipe, root)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read(TINY, SMALL)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("runs") / "calibrated"
    assert quiet(recipe, root) == 0
    return RunFolder(root)


# ---- the quantile ----


@pytest.mark.parametrize("n,rank", [(19, 19), (20, 20), (39, 38), (99, 95), (199, 190), (200, 191)])
def test_the_quantile_is_the_split_conformal_one(n: int, rank: int) -> None:
    values = torch.arange(1.0, n + 1)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    assert conformal_quantile(values, 0.95) == rank
    assert conformal_quantile(values[:18], 0.95) == float("inf")
    assert conformal_quantile(values[:0], 0.5) == float("inf")


def test_a_new_value_is_beyond_it_as_rarely_as_promised() -> None:
    random, beyond = np.random.default_rng(0), []
    for _ in range(2000):
        values = torch.from_numpy(random.gamma(2.0, size=41))
        beyond.append(float(values[40]) > conformal_quantile(values[:40], 0.9))
    # Rank 37 of 40: a chance of 4 in 41.
    assert scipy.stats.binomtest(sum(beyond), 2000, 4 / 41).pvalue > 1e-3


def test_the_source_s_quantile_lies_in_the_range_as_often_as_promised() -> None:
    values = torch.rand(2000, 100, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([quantile_range(row, 0.95) for row in values])
    inside = ((ends[:, 0] <= 0.95) & (ends[:, 1] > 0.95)).double().mean()
    assert 0.945 < float(inside) < 0.995  # ranks are whole numbers: a little too often
    assert quantile_range(torch.arange(1.0, 101), 0.95) == (90, 100)
    assert quantile_range(torch.arange(1.0, 41), 0.95) == (35, float("inf"))  # the largest of 40 may be below it


def test_metrics_that_are_higher_for_closer_maps_are_turned_and_undefined_distances_refused() -> None:
    a, b = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distance_of(L1(), a, b), L1()(a, b))
    assert torch.equal(distance_of(IoU(), a, b), 1 - IoU()(a, b))
    # Equal maps are at no distance, so that half of it is half the way: planted goals are found by that.
    assert torch.equal(distance_of(IoU(), a, a), torch.zeros(5))
    assert torch.equal(Known(IoU()).apart(a, a), torch.zeros(5))
    with pytest.raises(InputError, match="Cosine is undefined for 1 of 5 maps"):
        distance_of(Cosine(), torch.cat([torch.zeros(1, 4, 4), a[1:]]), b)


def test_draws_of_one_input_are_no_inputs_of_their_own() -> None:
    # 30 inputs, each of one value of its own and drawn ten times: 300 draws that know no more than 30.
    values = torch.arange(30.0).repeat(10)
    assert conformal_quantile(values, 0.9, inputs=30) == conformal_quantile(torch.arange(30.0), 0.9) == 27
    assert quantile_range(values, 0.5, inputs=30) == quantile_range(torch.arange(30.0), 0.5)
    hits = (torch.arange(30) < 6).float().repeat(10)
    found, alone = share_of_draws(hits, 30), share(hits[:30])
    assert (found.value, found.count) == (alone.value, 30)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_draws_that_win_do_not_turn_the_sign_of_a_random_system_s_cell() -> None:
    known = {"limit": 0.1, "limit_range": [0.05, 0.2]}
    folder: Any = SimpleNamespace(calibrated=lambda row: (known, {}))
    nothing: Any = SimpleNamespace(label="row", attack=SimpleNamespace(moves_map=False))
    # Every sample is plausible under its best draw, and none under the first, of which the distance is.
    arrays = {name: torch.ones(4) for name in ("plausible", "success", "joint_iou")} | {
        "distance": torch.full((4,), 0.15)
    }
    assert Summaries(nothing, folder, nothing)._by_limit(nothing, nothing, arrays) == [0.0, 1.0]


# ---- a row ----


def test_a_row_s_limit_is_measured_on_inputs_that_are_neither_judged_nor_trained_on(
    recipe: Recipe, finished: RunFolder
) -> None:
    judged = set(finished.arrays("gradient", "clean")["sample"].tolist())
    for row in ("gradient", "beta-smoothing (gradient)"):
        found = finished.calibrated(row)
        assert found is not None
        known, arrays = found
        assert (known["part"], known["inputs"], known["draws_made"]) == ("test", 60, 120)
        assert known["harmless"] == [{"name": "uniform-noise", "eps": 2 / 255}, {"name": "brightness", "by": 0.02}]
        assert not judged & set(arrays["sample"].tolist())
        kept = arrays["kept"] > 0
        assert known["draws"] == int(kept.sum())
        assert known["changed_prediction"] == share_of_draws(1 - arrays["kept"], 60).as_dict()
        by = [conformal_quantile(arrays["distance"][kept & (arrays["change"] == i)], 0.95) for i in range(2)]
        assert known["limit_by"] == by
        assert known["limit"] == max(by) > min(by)
        assert known["limit_from"] == known["harmless"][by.index(max(by))]
        # By hand, on the saved system.
        system, seed = System.load(finished.system(row)), derive(derive(recipe.seed, "calibration"), "harmless", 0)
        for kind, change in enumerate(recipe.evaluation.harmless):
            own = arrays["change"] == kind
            x = stack(recipe.data.load().test, arrays["sample"][own].tolist())[0]
            assert len(x) == 60
            with torch.no_grad():
                benign, seen = system(x), system(change(x, seed))
            assert torch.equal((benign.prediction == seen.prediction).float(), arrays["kept"][own])
            torch.testing.assert_close(L1()(seen.maps, benign.maps), arrays["distance"][own], atol=1e-6, rtol=1e-4)


def test_fresh_harmless_changes_are_beyond_the_limit_as_rarely_as_promised(recipe: Recipe, finished: RunFolder) -> None:
    """Of each kind; the limit's own luck included: with 60 distances, the share beyond the 58th is Beta(3, 58)."""
    data = recipe.data.load()
    used = {p for row in ("clean",) for p in finished.arrays("gradient", row)["sample"].tolist()}
    for row in ("gradient", "beta-smoothing (gradient)"):
        known, arrays = finished.calibrated(row) or ({}, {})
        left = [i for i in range(len(data.test)) if i not in used | set(arrays["sample"].tolist())][:400]
        x, y = stack(data.test, left)
        system = System.load(finished.system(row))
        with torch.no_grad():
            x = x[system.model(x).argmax(1) == y]  # as those that are judged
            benign, changed = system(x), [system(change(x, 99)) for change in recipe.evaluation.harmless]
        for kind, seen in enumerate(changed):
            distances = L1()(seen.maps, benign.maps)[benign.prediction == seen.prediction]
            beyond, n = int((distances > known["limit"]).sum()), int(arrays["kept"][arrays["change"] == kind].sum())
            rank = int(np.ceil((n + 1) * 0.95))
            chance = scipy.stats.betabinom(len(distances), n + 1 - rank, rank)
            print(f"{row}: {known['harmless'][kind]} {beyond / len(distances):.3f} of {len(distances)}")
            assert beyond <= chance.ppf(1 - 1e-4)
            if known["limit"] == known["limit_by"][kind]:
                assert chance.ppf(1e-4) <= beyond


def test_cells_are_judged_by_their_rows_limit_and_say_how_well_attacked_maps_stand_out(finished: RunFolder) -> None:
    for row in ("gradient", "beta-smoothing (gradient)"):
        known, harmless = finished.calibrated(row) or ({}, {})
        for column in ("clean", "adv2", "ghorbani-topk"):
            found, cell = finished.arrays(row, column), finished.read_cell(row, column)
            assert cell is not None
            near = found["distance"] <= known["limit"]
            moves = column == "ghorbani-topk"
            assert torch.equal(found["plausible"], (near ^ moves).float())
            assert torch.equal(found["plausible_iou"], ((found["iou"] > 0.5) ^ moves).float())
            kinds = [harmless["distance"][(harmless["kept"] > 0) & (harmless["change"] == i)] for i in range(2)]
            expected = [separation(kind, found["distance"], known["inputs"]).as_dict() for kind in kinds]
            assert cell["separation_by"] == expected
            assert cell["measures"]["separation"]["value"] == min(e["value"] for e in expected)
        clean = finished.read_cell(row, "clean")
        assert clean is not None
        assert clean["measures"]["separation"]["value"] == 0  # nearer than any harmless change
        assert clean["measures"]["joint"]["high"] == share(torch.zeros(16)).high
    other = finished.read_cell("beta-smoothing (gradient)", "adv2")
    assert other is not None
    assert {"p", "low", "high"} <= other["against_undefended"]["joint"].keys()
    assert other["against_undefended"]["success"]["high"] > 0.1  # the same classifier: no sample differs, and yet


def test_cells_say_what_another_calibration_could_make_of_them(finished: RunFolder) -> None:
    for row in ("gradient", "beta-smoothing (gradient)"):
        known, _ = finished.calibrated(row) or ({}, {})
        low, high = known["limit_range"]
        assert low < known["limit"]
        assert high is None or known["limit"] <= high
        for column, order in (("adv2", 1), ("ghorbani-topk", -1)):
            cell = finished.read_cell(row, column)
            assert cell is not None
            arrays, joint = finished.arrays(row, column), cell["measures"]["joint"]["value"]
            at_low, at_high = cell["joint_by_limit"]
            # A smaller limit is harder for who keeps the map, and easier for who moves it.
            assert (joint - at_low) * order >= 0
            assert at_high is None or (at_high - joint) * order >= 0
            plausible = (arrays["distance"] <= low) if order > 0 else (arrays["distance"] > low)
            assert at_low == pytest.approx(float(((arrays["success"] > 0) & plausible).float().mean()))


def test_the_report_says_on_what_rows_are_calibrated(finished: RunFolder) -> None:
    report = (finished.root / "report.html").read_text()
    assert "than 95% of harmless changes move" in " ".join(report.split())
    assert "uniform-noise (eps 0.007843); brightness (by 0.02)" in " ".join(report.split())
    assert "the test part beyond the judged ones" in report
    assert "IoU above" not in report.split("<h2>The matrix")[1].split("<img")[0]
    results = Results.read(finished)
    assert set(results.calibrations) == {"gradient", "beta-smoothing (gradient)"}
    assert {"separation", "distance", "joint_iou", "plausible_iou"} <= set(words_of({}))


# ---- resuming ----


def test_a_calibration_is_kept_made_anew_with_its_row_and_resumed_in_chunks(
    recipe: Recipe, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(shutil.copytree(finished.root, tmp_path / "run"))
    path, other = folder.calibration("gradient"), folder.calibration("beta-smoothing (gradient)")
    before, kept = path.read_bytes(), other.stat().st_mtime_ns
    path.unlink()
    real, left = Calibrator.measure, [1]

    def killed(self: Calibrator, system: System, draws: Draws) -> dict[str, Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, system, draws)

    with monkeypatch.context() as patch:
        patch.setattr(Calibrator, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet(recipe, folder.root)
    assert not path.is_file()
    assert len(list((folder.root / "calibrated").rglob("*.safetensors"))) == 1
    assert quiet(recipe, folder.root) == 0
    assert path.read_bytes() == before
    assert other.stat().st_mtime_ns == kept
    assert not (folder.root / "calibrated").exists()
    changed = read(TINY, [*SMALL, "defenses=[{name: beta-smoothing, of: gradient, beta: 30}]", "attacks=[clean]"])
    assert quiet(changed, folder.root) == 0
    assert path.read_bytes() == before
    assert other.stat().st_mtime_ns != kept
    with pytest.raises(InputError, match=r"evaluation\.harmless"):
        quiet(read(TINY, [*SMALL, "evaluation.harmless=[shift]"]), folder.root)


def test_a_row_that_cannot_be_calibrated_is_a_hole_that_says_why(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Calibrator.measure

    def brittle(self: Calibrator, system: System, draws: Draws) -> dict[str, Tensor]:
        found = real(self, system, draws)
        smooth = isinstance(system.interpreter, interpreters.Smoothed)
        return {**found, "kept": found["kept"] * (found["sample"] % 4 == 0)} if smooth else found

    monkeypatch.setattr(Calibrator, "measure", brittle)
    assert quiet(recipe, tmp_path / "run") == 3
    folder = RunFolder(tmp_path / "run")
    cell = folder.read_cell("beta-smoothing (gradient)", "adv2")
    assert cell is not None
    assert cell["status"] == "failed"
    assert "uniform-noise: this harmless change changes the prediction for" in cell["traceback"]
    assert folder.done("gradient", "adv2") is not None
    # Nor can there be an adversary who knows a limit that there is not.
    assert quiet(read(TINY, [*SMALL, "attacks[1].knowledge=adaptive"]), tmp_path / "adaptive") == 3
    cell = RunFolder(tmp_path / "adaptive").read_cell("beta-smoothing (gradient)", "adv2, adaptive")
    assert cell is not None
    assert "uniform-noise: this harmless change changes the prediction for" in cell["traceback"]


# ---- which inputs, from Python ----


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def parts(test: int, defense: int) -> Data:
    def part(n: int) -> Inputs:
        x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
        return Inputs(x, tuple(i % 3 for i in range(n)))

    return Data("own", ("a", "b", "c"), (1, 8, 8), Inputs((), ()), part(defense), part(test), "")


@pytest.mark.parametrize(
    "beyond,defense,part,inputs",
    [
        (90, 500, "test", 60),
        (29, 500, "defense", 60),
        (20, 25, "defense", 25),
        (20, 5, "test", 20),
        (0, 0, "judged", 9),
    ],
)
def test_the_inputs_are_the_best_that_there_are(beyond: int, defense: int, part: str, inputs: int) -> None:
    settings = Evaluation(calibration=60, batch_size=16)
    data = parts(200, defense)
    made = calibrator(data, settings, range(9), range(9, 9 + beyond), 0, torch.device("cpu"))
    assert made.part == part
    draws = [(int(s), int(d)) for chunk in made.draws for s, d in zip(chunk.samples, chunk.draw, strict=True)]
    assert len(draws) == len(set(draws)) == 60
    assert len({sample for sample, _ in draws}) == inputs
    if part == "test":
        assert all(9 <= sample < 9 + beyond for sample, _ in draws)
    assert [chunk.index for chunk in made.draws] == [0, 1, 2, 3]


@dataclass(frozen=True, eq=False)
class Energy(Detector):
    """How little the logits say."""

    model: nn.Module

    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        return -self.model(x).logsumexp(1)

    def soft_score(self, x: Tensor) -> Tensor:
        return self.score(x)


@pytest.mark.parametrize("used", [60, 40])
def test_false_alarms_are_those_on_inputs_that_are_new_to_the_detector(used: int) -> None:
    model, data, settings = net(), parts(20, 60), Evaluation(calibration=60, batch_size=16)
    made = calibrator(data, settings, range(9), range(9, 9), 0, torch.device("cpu"))
    x = torch.cat([chunk.x for chunk in made.draws])
    system = rx.System(model, interpreters.Gradient(model), Energy(model))
    system = system.recalibrated(x[:used], 0.1)
    found = [made.measure(system, chunk) for chunk in made.draws]
    arrays = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    alarms = made.summary(arrays, Plausible())["false_alarms"]
    assert alarms["clean"]["count"] == alarms["harmless"]["count"] == 60 - used
    assert (alarms["clean"]["value"] is None) == (used == 60)


def test_the_report_of_a_detector_that_knows_all_inputs_says_so(tmp_path: Path) -> None:
    watched = "defenses=[{name: feature-squeezing, of: gradient, squeezers: [bit-depth-2]}]"
    few = ["data.fractions=[0.5, 0.4, 0.1]", "evaluation.images=178", "interpreters=[gradient]", watched]
    assert quiet(read(TINY, [*SMALL, *few]), tmp_path) == 0
    known, _ = RunFolder(tmp_path).calibrated("feature-squeezing (gradient)") or ({}, {})
    assert known["part"] == "defense"
    assert known["false_alarms"]["clean"]["value"] is None
    assert (tmp_path / "report.html").is_file()


def test_few_inputs_of_ones_own_are_changed_several_times(tmp_path: Path) -> None:
    model = net()
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    system = rx.System(model, interpreters.Gradient(model))
    settings = Evaluation(batch_size=5, calibration=30, harmless=(UniformNoise(0.02),), bootstrap=50)
    given = (x, model(x).argmax(1))
    results = evaluate({"gradient": system}, {"pgd": attacks.PGD(steps=2)}, given, out=tmp_path, evaluation=settings)
    known, arrays = RunFolder(tmp_path).calibrated("gradient") or ({}, {})
    assert (known["part"], known["inputs"], known["draws_made"]) == ("judged", 8, 30)
    assert known["changed_prediction"]["count"] == 8
    twice = arrays["distance"][arrays["sample"] == 3]
    assert len(twice) == len(set(twice.tolist())) == 4
    assert results.experiment.evaluation == settings
    found = results.measure("gradient", "pgd", "separation")
    assert found is not None
    assert found["count"] == 8


def test_changes_and_distances_of_another_kind_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = nn.Linear(4, 2).eval()
    x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    system, given = rx.System(model, interpreters.Gradient(model)), (x, model(x).argmax(1))
    for settings, said in (
        (Evaluation(harmless=(UniformNoise(),)), "harmless[0]: uniform-noise changes images, and data holds tables"),
        (Evaluation(plausible=Plausible(distance="ssim")), "distance: ssim does not compare maps of tables"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            evaluate({"g": system}, {"clean": attacks.Clean()}, given, out=tmp_path / "run", evaluation=settings)
    assert not (tmp_path / "run").exists()
    evaluate({"g": system}, {"clean": attacks.Clean()}, given, out=tmp_path / "run")
    known, arrays = RunFolder(tmp_path / "run").calibrated("g") or ({}, {})
    assert known["harmless"] == [{"name": "column-noise", "share": 0.02}]
    # The gradient of a linear model is the same everywhere, but for the class and for rounding.
    assert float(arrays["distance"][arrays["kept"] > 0].max()) < known["limit"] == 1e-6
    assert len(arrays["distance"]) == 100


def test_the_papers_measure_can_stand_alone(tmp_path: Path) -> None:
    model = net()
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    system, given = rx.System(model, interpreters.Gradient(model)), (x, model(x).argmax(1))
    for calibration in (0, 30):
        settings = Evaluation(plausible=Plausible(iou=0.3), calibration=calibration, bootstrap=50)
        root = tmp_path / str(calibration)
        results = evaluate({"g": system}, {"pgd": attacks.PGD(steps=2)}, given, out=root, evaluation=settings)
        found = RunFolder(root).arrays("g", "pgd")
        assert torch.equal(found["plausible"], (found["iou"] > 0.3).float())
        assert "plausible_iou" not in found
        assert ("distance" in found) is (calibration > 0)
        assert (results.measure("g", "pgd", "separation") is not None) is (calibration > 0)
        assert "IoU above 0.3" in (root / "report.html").read_text()
