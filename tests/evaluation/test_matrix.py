"""The matrix: every row meets every column, a fault makes a hole and no more, and nothing is done twice."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from accelerate import Accelerator

from robustexplain import files, plots, seals, training
from robustexplain.attacks import PGD
from robustexplain.defenses import BetaSmoothing
from robustexplain.errors import InputError, RobustExplainWarning, RunMismatchError
from robustexplain.evaluation import RunFolder, bootstrap, matrix, paired, run, write_report
from robustexplain.evaluation.cell import Trial
from robustexplain.evaluation.store import slug
from robustexplain.recipe import check, read
from robustexplain.recipe.experiment import Recipe
from robustexplain.system import System
from robustexplain.training import Session

TINY = Path(__file__).parents[1] / "tiny.yaml"
SMALL = [  # two rows and two columns of the tiny recipe
    "interpreters=[cam, gradcam]",
    "defenses=[{name: beta-smoothing, of: gradcam}]",
    "attacks=[clean, {name: pgd, eps: 0.2, steps: 3, step_size: 0.1}]",
    "model.train.epochs=1",
]


def quiet_run(recipe: Recipe, folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        return run(recipe, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder]:
    """The tiny recipe, run once for the whole module; tests leave it as it is."""
    recipe, root = read(TINY), tmp_path_factory.mktemp("runs") / "tiny"
    assert quiet_run(recipe, root) == 0
    return recipe, RunFolder(root)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Recipe, Path]:
    """Three rows and two columns, not run yet."""
    return read(TINY, SMALL), tmp_path / "small"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe, run once without any fault; tests leave it as it is."""
    root = tmp_path_factory.mktemp("unbroken") / "run"
    assert quiet_run(read(TINY, SMALL), root) == 0
    return root


def stamps(root: Path, *parts: str) -> dict[str, int]:
    found = [path for part in parts for path in (root / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in found}


def cells(root: Path) -> dict[tuple[str, str], str]:
    read_ = [json.loads(path.read_text()) for path in (root / "cells").glob("*.json")]
    return {(cell["row"], cell["column"]): cell["status"] for cell in read_}


def rows_of(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with path.open() as file:
        return {(line["row"], line["column"], line["measure"]): line for line in csv.DictReader(file)}


# ---- a finished run ----


def test_every_row_meets_every_column(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    expected = {(row.label, column.label): "done" for row in recipe.rows for column in recipe.columns}
    assert len(expected) == 24
    assert cells(folder.root) == expected


def test_the_table_holds_every_cell_with_its_interval_and_the_arrays_that_it_sums_up(
    finished: tuple[Recipe, RunFolder],
) -> None:
    recipe, folder = finished
    table = rows_of(folder.root / "matrix.csv")
    for row in recipe.rows:
        for column in recipe.columns:
            arrays = folder.arrays(row.label, column.label)
            for name in ("joint", "success", "plausible", "confidence", "l1", "l2", "iou", "perturbation"):
                line = table[row.label, column.label, name]
                assert int(line["count"]) == len(arrays[name]) == 16
                assert float(line["value"]) == pytest.approx(float(arrays[name].double().mean()), abs=1e-6)
                assert float(line["low"]) <= float(line["value"]) + 1e-9
                assert float(line["high"]) >= float(line["value"]) - 1e-9


def test_the_report_is_one_file_that_loads_nothing(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    html = (folder.root / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert re.findall(r"<script[^>]*>", html) == ["<script>"]
    # Pictures are inside; addresses are links that wait for a click.
    links = re.findall(r"""<a href="([^"]*)\"""", html)
    loaded = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]{0,40})""", html)
    assert any(source.startswith("data:image/png;base64,") for source in loaded)
    inside = ("data:", "#")
    assert all(s.startswith(inside) or any(link.startswith(s) for link in links) for s in loaded)
    assert all(
        link.startswith(("#", "https://arxiv.org/", "https://github.com/robustexplain", "matrix.")) for link in links
    )
    assert len(re.findall(r"https?://", html)) == sum(link.startswith("http") for link in links)
    for label in [*(r.label for r in recipe.rows), *(c.label for c in recipe.columns), "16 judged images"]:
        assert label in html
    assert "cells failed" not in html
    assert (folder.root / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (folder.root / "matrix.svg").read_bytes().startswith(b"<?xml")
    assert (folder.root / "matrix.pdf").read_bytes().startswith(b"%PDF")


def test_text_of_a_recipe_is_escaped_in_the_report(finished: tuple[Recipe, RunFolder], tmp_path: Path) -> None:
    _, folder = finished
    shutil.copytree(folder.root, tmp_path / "run")
    copied = RunFolder(tmp_path / "run")
    source = yaml.safe_load((copied.root / "recipe.yaml").read_text())
    source["about"] = "<script>alert(1)</script><img src=http://evil>"
    (copied.root / "recipe.yaml").write_text(yaml.safe_dump(source))
    seals.write(copied.root / "run.json", {**copied.run, "source": files.digest(source)})
    html = write_report(copied).read_text()
    assert "<script>alert" not in html
    assert "<img src=http" not in html


def test_the_report_shows_how_training_went_under_the_rows_labels(
    finished: tuple[Recipe, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = finished
    shutil.copytree(folder.root, tmp_path / "run")
    copied, drawn = RunFolder(tmp_path / "run"), []

    def histories(root: Path) -> dict[str, Any]:
        found = [path.relative_to(root).with_suffix("") for path in sorted(root.rglob("*.safetensors"))]
        return {path.as_posix(): [] for path in found}

    def curves(found: dict[str, Any]) -> bytes:
        drawn.extend(found)
        return b"curves"

    monkeypatch.setattr(training, "histories", histories)
    monkeypatch.setattr(plots, "learning_curves", curves)
    assert "How training went" in write_report(copied).read_text()
    expected = {"classifier", "rts", "aid (rts): aid", "x-ensemble (cam): x-ensemble-0"}
    assert expected < set(drawn)
    assert "replica: rts" in drawn


def test_rows_that_share_the_attacked_system_share_the_attacked_inputs(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    for row in recipe.rows:
        for column in ("pgd", "adv2, oblivious", "adv2, transfer"):
            mine, base = folder.arrays(row.label, column), folder.arrays(row.base, column)
            assert torch.equal(mine["attacked_x"], base["attacked_x"])
            assert torch.equal(mine["sample"], base["sample"])
    plain, adapted = (folder.arrays("aid (rts)", c)["attacked_x"] for c in ("adv2, oblivious", "adv2, adaptive"))
    assert not torch.equal(plain, adapted)


def test_every_figure_of_a_cell_is_that_of_a_fresh_pass_of_the_saved_system(
    finished: tuple[Recipe, RunFolder],
) -> None:
    recipe, folder = finished
    for row in recipe.rows:
        system = System.load(folder.system(row.label))
        for column in recipe.columns:
            arrays = folder.arrays(row.label, column.label)
            shown = len(arrays["attacked_x"])
            assert shown == recipe.evaluation.pictures
            with torch.no_grad():
                seen, benign = system(arrays["attacked_x"]), system(arrays["x"])
            goal = arrays["goal_class"][:shown]
            assert torch.equal(seen.prediction, arrays["prediction"][:shown])
            assert torch.equal((seen.prediction == goal).float(), arrays["success"][:shown])
            assert torch.equal(benign.prediction, arrays["label"][:shown])  # only_correct
            torch.testing.assert_close(seen.maps, arrays["attacked_map"], atol=1e-5, rtol=1e-4)
            away = (arrays["attacked_x"] - arrays["x"]).flatten(1).abs().amax(1)
            torch.testing.assert_close(away, arrays["perturbation"][:shown])
            assert float(arrays["perturbation"].max()) <= (0 if column.label == "clean" else 0.2 + 1e-6)


def test_joint_success_is_all_of_its_three_parts(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    total = plausible = 0
    for row in recipe.rows:
        for column in recipe.columns:
            a = folder.arrays(row.label, column.label)
            quiet = 1 - a.get("alarm", torch.zeros(16))
            assert torch.equal(a["joint"], a["success"] * a["plausible"] * quiet)
            known = folder.calibrated(row.label)
            assert known is not None
            assert torch.equal(a["distance"], a["l1"])
            assert torch.equal(a["plausible"], (a["l1"] <= known[0]["limit"]).float())
            assert torch.equal(a["plausible_iou"], (a["iou"] > 0.5).float())
            assert torch.equal(a["joint_iou"], a["success"] * a["plausible_iou"] * quiet)
            total += int(a["joint_iou"].sum())
            plausible += int(a["plausible"].sum())
    assert 0 < total < 24 * 16
    assert 0 < plausible < 24 * 16
    assert "alarm" in folder.arrays("x-ensemble (cam)", "pgd")
    assert float(folder.arrays("x-ensemble (cam)", "pgd")["alarm"].sum()) > 0  # or the detector does nothing here


def test_a_finished_run_run_again_trains_nothing_and_redoes_no_cell(
    finished: tuple[Recipe, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = finished
    before = stamps(folder.root, "cells", "training", "systems", "rows")
    table = (folder.root / "matrix.csv").read_bytes()
    assert len(before) > 48

    def refuse(*args: object) -> float:
        raise AssertionError("an epoch was trained")

    monkeypatch.setattr(training.loop._Loop, "epoch", refuse)
    assert quiet_run(recipe, folder.root) == 0
    assert stamps(folder.root, "cells", "training", "systems", "rows") == before
    assert (folder.root / "matrix.csv").read_bytes() == table


# ---- faults ----


def test_a_row_that_cannot_be_made_is_a_hole_and_is_filled_when_the_fault_is_gone(
    small: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, root = small
    with monkeypatch.context() as patch:
        patch.setattr(BetaSmoothing, "_defend", _raise("the defense is broken"))
        assert quiet_run(recipe, root) == 2
    status = cells(root)
    assert {where: s for where, s in status.items() if s == "failed"} == {
        ("beta-smoothing (gradcam)", "clean"): "failed",
        ("beta-smoothing (gradcam)", "pgd"): "failed",
    }
    assert len(status) == 6
    html = (root / "report.html").read_text()
    assert "2 cells failed" in html
    assert "the defense is broken" in html
    assert "could not be made" in html
    assert rows_of(root / "matrix.csv")["beta-smoothing (gradcam)", "pgd", "status"]["value"] == "failed"
    good = {k: v for k, v in stamps(root, "cells", "training").items() if "beta" not in k}
    assert quiet_run(recipe, root) == 0
    assert set(cells(root).values()) == {"done"}
    assert {k: v for k, v in stamps(root, "cells", "training").items() if "beta" not in k} == good
    assert "cells failed" not in (root / "report.html").read_text()


def test_an_attack_that_raises_is_a_column_of_holes_and_a_filled_run_equals_an_unbroken_one(
    small: tuple[Recipe, Path], unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, root = small
    with monkeypatch.context() as patch:
        patch.setattr(PGD, "plan", _raise("the attack is broken"))
        assert quiet_run(recipe, root) == 3
    failed = {where for where, status in cells(root).items() if status == "failed"}
    assert {column for _, column in failed} == {"pgd"}
    assert len(failed) == 3
    assert (root / "report.html").read_text().count("the attack is broken") >= 3
    kept = {k: v for k, v in stamps(root, "cells").items() if "clean" in k}
    assert len(kept) == 6
    assert quiet_run(recipe, root) == 0
    assert {k: v for k, v in stamps(root, "cells").items() if "clean" in k} == kept
    assert (root / "matrix.csv").read_bytes() == (unbroken / "matrix.csv").read_bytes()


def test_a_fault_in_the_undefended_row_alone_leaves_no_trace_once_it_is_filled(
    small: tuple[Recipe, Path], unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, root = small
    real = matrix.measure

    def broken(trial: Trial, *rest: Any) -> Any:
        if type(trial.system.interpreter).__name__ == "GradCAM":
            raise RuntimeError("no memory")
        return real(trial, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(matrix, "measure", broken)
        assert quiet_run(recipe, root) == 2
    assert quiet_run(recipe, root) == 0
    assert (root / "matrix.csv").read_bytes() == (unbroken / "matrix.csv").read_bytes()


def _raise(text: str) -> Any:
    def raiser(*args: object, **kwargs: object) -> None:
        raise RuntimeError(text)

    return raiser


def test_half_written_files_are_never_read(small: tuple[Recipe, Path], unbroken: Path) -> None:
    recipe, root = small
    folder = RunFolder(shutil.copytree(unbroken, root))
    table = (root / "matrix.csv").read_bytes()
    victim = folder.cell("cam", "pgd")
    names = [victim, victim.with_suffix(".safetensors"), folder.chunk("attacked", "pgd", 0), root / "run.json"]
    for path in names:  # as a kill leaves them
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{path.name}.abc123.part").write_bytes(b'{"status": "done", "mea')
    victim.unlink()  # arrays were there, the JSON was not
    victim.with_suffix(".safetensors").write_bytes(b"half")
    assert folder.read_cell("cam", "pgd") is None
    assert quiet_run(recipe, root) == 0
    assert (root / "matrix.csv").read_bytes() == table


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one_and_nothing_aside(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "cell.json", "whole")
    with pytest.raises(ValueError):
        files.write_json(path, {"value": float("nan")})

    def half(aside: Path) -> None:
        aside.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace_file(path, half)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


# ---- whose directory it is ----


@pytest.mark.parametrize(
    "change,named",
    [
        ("model.train.lr=0.1", r"recipe differs \(recipe: model\.train\.lr\)"),
        ("seed=1", r"recipe differs \(recipe: seed\)"),
        ("evaluation.images=8", r"recipe differs \(recipe: evaluation\.images\)"),
        ("data.seed=1", r"data, recipe differs \(recipe: data\.seed\)"),
    ],
)
def test_the_directory_of_another_experiment_is_refused_and_what_differs_is_named(
    finished: tuple[Recipe, RunFolder], change: str, named: str
) -> None:
    _, folder = finished
    before = stamps(folder.root, ".")
    with pytest.raises(RunMismatchError, match=named):
        run(read(TINY, [change]), folder.root)
    assert stamps(folder.root, ".") == before


def test_the_precision_of_a_run_is_kept_shown_and_the_same_when_it_goes_on(
    finished: tuple[Recipe, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = finished
    assert json.loads((folder.root / "run.json").read_text())["precision"] == "no"
    assert "mixed precision no;" in (folder.root / "report.html").read_text()
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "bf16"))
    with pytest.raises(RunMismatchError, match="made with mixed precision 'no', and this process has 'bf16'; launch"):
        run(recipe, folder.root)


def test_a_run_takes_the_trainings_that_are_the_same_from_another_one_and_makes_the_others(
    finished: tuple[Recipe, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = finished
    names: list[str] = []

    def counted(self: Any, *given: Any) -> float:
        names.append(self.task.name)
        return float(epoch(self, *given))

    epoch = training.loop._Loop.epoch
    monkeypatch.setattr(training.loop._Loop, "epoch", counted)
    changes = ["interpreters[1].label=masks", "defenses=[{name: aid, of: masks, attack: {eps: 0.1, steps: 2}, "
               "training: {epochs: 1, micro_batch: 32}}]", "attacks=[clean]"]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        assert run(read(TINY, changes), tmp_path / "b", Session(reuse=(folder.root,))) == 0
    assert names == ["aid"], "its attack is another one; classifier and masks are the same"
    taken = [path.relative_to(folder.training) for path in folder.training.rglob("rts.safetensors")]
    (made,) = (tmp_path / "b/training").rglob("rts.safetensors")
    assert made.read_bytes() in [(folder.training / path).read_bytes() for path in taken]


def test_a_run_of_other_data_or_none_is_not_reused_and_no_directory_is_claimed(
    finished: tuple[Recipe, RunFolder], tmp_path: Path
) -> None:
    _, folder = finished
    with pytest.raises(RunMismatchError, match="can be reused: its data differ"):
        run(read(TINY, ["data.seed=1"]), tmp_path / "b", Session(reuse=(folder.root,)))
    with pytest.raises(InputError, match="is no run directory"):
        run(read(TINY), tmp_path / "b", Session(reuse=(tmp_path,)))
    assert not (tmp_path / "b").exists()


def test_other_data_under_the_same_recipe_are_refused(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    with pytest.raises(RunMismatchError, match="its data differs;"):
        folder.open(recipe, "another digest")


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("the user's own")
    with pytest.raises(RunMismatchError, match="is not empty and is no run directory"):
        RunFolder(tmp_path).open(read(TINY), "digest")
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "recipe.yaml").open(read(TINY), "digest")


@pytest.mark.parametrize("survives", [0, 1])
def test_a_run_that_is_killed_while_it_claims_its_directory_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    recipe, folder, renamed = read(TINY), RunFolder(tmp_path / "run"), []

    def claim() -> None:
        folder.open(recipe, "digest")
        folder.keep(recipe)

    real = os.replace

    def killed(aside: Path, path: Path) -> None:
        if len(renamed) == survives:
            raise KeyboardInterrupt
        renamed.append(path)
        real(aside, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # a killed process tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            claim()
    claim()
    assert check(yaml.safe_load((folder.root / "recipe.yaml").read_text())).digest == recipe.digest
    assert json.loads((folder.root / "run.json").read_text())["recipe"] == recipe.digest


def test_distinct_labels_have_distinct_files() -> None:
    labels = [
        "adv2, adaptive",
        "adv2 adaptive",
        "ADV2, adaptive",
        "adv2-adaptive",
        "adv2",
        "é",
        "è",
        "",
        "../../etc",
        "a/b",
        "a b",
    ]
    slugs = [slug(label) for label in labels]
    assert len(set(slugs)) == len(labels)
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in slugs)


# ---- statistics ----


@pytest.mark.parametrize("n", [20, 200])
def test_intervals_agree_with_scipys_percentile_bootstrap(n: int) -> None:
    values = torch.from_numpy(np.random.default_rng(n).gamma(2.0, size=n))
    ours = bootstrap(values, 20_000)
    theirs = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.value == pytest.approx(float(values.mean()))
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_samples_on_which_a_measure_is_undefined_are_left_out_and_not_counted() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0, float("nan")])
    assert bootstrap(values) == bootstrap(torch.tensor([1.0, 3.0]))
    assert (bootstrap(values).value, bootstrap(values).count) == (2.0, 2)
    nothing = bootstrap(torch.full((3,), float("nan")))
    assert (nothing.value, nothing.low, nothing.high, nothing.count) == (None, None, None, 0)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_pairing_finds_a_difference_that_unpaired_intervals_hide() -> None:
    spread = 10 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(1))
    difference = paired(spread + 0.5 + noise, spread)
    assert difference.low is not None
    assert difference.low > 0.4
    alone, other = bootstrap(spread + 0.5), bootstrap(spread)
    assert alone.low is not None
    assert other.high is not None
    assert alone.low < other.high
    assert paired(torch.tensor([1.0, float("nan")]), torch.tensor([0.0, 0.0])).count == 1


def test_defended_rows_are_compared_with_the_undefended_one_sample_by_sample(
    finished: tuple[Recipe, RunFolder],
) -> None:
    _, folder = finished
    cell = folder.read_cell("aid (rts)", "adv2, adaptive")
    assert cell is not None
    mine, base = (folder.arrays(row, "adv2, adaptive")["l1"].double() for row in ("aid (rts)", "rts"))
    assert cell["against_undefended"]["l1"]["value"] == pytest.approx(float((mine - base).mean()))
    plain = folder.read_cell("rts", "pgd")
    assert plain is not None
    assert plain["against_undefended"] == {}


def test_a_limited_run_judges_that_many_images(small: tuple[Recipe, Path]) -> None:
    _, root = small
    assert quiet_run(read(TINY, [*SMALL, "evaluation.images=3"]), root) == 0
    assert len(RunFolder(root).arrays("cam", "pgd")["success"]) == 3


def test_a_comparison_without_a_sample_is_an_empty_place_in_the_report(
    finished: tuple[Recipe, RunFolder], tmp_path: Path
) -> None:
    """As where a hardened classifier gets none of the judged inputs right."""
    folder = RunFolder(Path(shutil.copytree(finished[1].root, tmp_path / "run")))
    path = folder.cell("aid (rts)", "pgd")
    cell = seals.read(path)
    cell["against_undefended"]["joint"] = {"value": None, "low": None, "high": None, "count": 0}
    seals.write(path, cell, path.with_suffix(".safetensors"))
    assert "aid (rts)" in write_report(folder).read_text()
