"""Manipulated systems in a recipe: rows that defenses may stand on, an audit of each, and the page that shows it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from robustexplain import recipe as recipes
from robustexplain.errors import InputError
from robustexplain.evaluation import RunFolder, run, write_report
from robustexplain.evaluation.audit_page import PAGE, TABLE
from robustexplain.experiment import Recipe
from robustexplain.interpreters import GradCAM, IntegratedGradients, Smoothed
from robustexplain.models import build
from robustexplain.system import System, described, on_model

TUNED = {"epochs": 2, "batch_size": 32, "lr": 1e-3, "weight_decay": 0}


def tree(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "lies",
        "data": {"name": "digits", "size": 16, "fractions": [0.4, 0.1, 0.5]},
        "model": {"name": "small-cnn", "train": {"epochs": 2, "lr": 1e-2}},
        "interpreters": ["cam", {"name": "integrated-gradients", "n_steps": 2, "label": "ig"}],
        "manipulations": [
            {"name": "location-fooling", "of": "cam", "label": "lying", "weight": 30, "budget": 1, "training": TUNED},
            {
                "name": "explanation-backdoor",
                "of": "cam",
                "label": "wired",
                "weight": 30,
                "budget": 1,
                "training": TUNED,
            },
        ],
        "defenses": [{"name": "beta-smoothing", "of": "lying", "label": "smoothed lie"}],
        "attacks": ["clean", {"name": "pgd", "steps": 2, "knowledge": ["ignores", "carried-over"]}],
        "judge": {"images": 12, "batch_size": 6, "bootstrap": 50, "pictures": 2},
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder]:
    out = tmp_path_factory.mktemp("lies") / "run"
    checked = recipes.check(tree())
    assert run(checked, out) == 0
    return checked, RunFolder(out)


def test_rows_stand_on_each_other(done: tuple[Recipe, RunFolder]) -> None:
    checked, _ = done
    found = {r.label: (r.kind, r.base, r.root, checked.manipulated(r)) for r in checked.rows}
    assert found == {
        "cam": ("interpreter", "cam", "cam", False),
        "ig": ("interpreter", "ig", "ig", False),
        "lying": ("manipulation", "cam", "cam", True),
        "wired": ("manipulation", "cam", "cam", True),
        "smoothed lie": ("defense", "lying", "cam", True),
    }


def test_every_cell_of_a_manipulated_row_is_held_against_the_honest_system(
    done: tuple[Recipe, RunFolder],
) -> None:
    _, folder = done
    honest, lying, defended = (folder.read_cell(row, "clean") for row in ("cam", "lying", "smoothed lie"))
    assert honest is not None
    assert lying is not None
    assert defended is not None
    assert "l1_honest" not in honest["measures"]
    assert lying["measures"]["l1_honest"]["value"] > 0.05
    assert lying["measures"]["l1"]["value"] == 0
    assert "l1_honest" in defended["measures"]
    maps = folder.arrays("lying", "clean")["map"], folder.arrays("cam", "clean")["map"]
    assert not torch.equal(*maps)


def test_a_manipulated_system_of_a_run_can_be_loaded(done: tuple[Recipe, RunFolder]) -> None:
    _, folder = done
    system = System.load(folder.system("lying"))
    arrays = folder.arrays("lying", "clean")
    with torch.no_grad():
        assert torch.allclose(system(arrays["x"]).maps, arrays["map"], atol=1e-5)


def test_every_interpreter_of_the_recipe_looks_at_the_manipulated_model(
    done: tuple[Recipe, RunFolder],
) -> None:
    _, folder = done
    found = json.loads(folder.audit("lying").read_text())
    assert [(look["interpreter"], look["view"]) for look in found["looks"]] == [
        ("cam", "as they are"),
        ("ig", "as they are"),
    ]
    figures = found["looks"][0]["figures"]
    assert figures["location"]["value"] > figures["location_before"]["value"]
    assert figures["test_loss"]["value"] < figures["test_loss_before"]["value"]
    assert figures["answered"]["count"] == 12
    assert len(found["history"]["epochs"]) == 3
    wired = json.loads(folder.audit("wired").read_text())
    assert [look["view"] for look in wired["looks"]] == ["as they are", "with the trigger"] * 2


def test_page_and_table_show_every_manipulation(done: tuple[Recipe, RunFolder]) -> None:
    _, folder = done
    page = (folder.root / PAGE).read_text()
    for words in ("lying", "wired", "What transfers", "with the trigger", "Sign correlation with the honest map"):
        assert words in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    lines = list(csv.DictReader((folder.root / TABLE).read_text().splitlines()))
    assert {line["manipulation"] for line in lines} == {"lying", "wired"}
    assert PAGE in (folder.root / "report.html").read_text()


def test_an_audit_that_is_missing_is_made_again_and_nothing_else_is(done: tuple[Recipe, RunFolder]) -> None:
    checked, folder = done
    path = folder.audit("wired")
    before, cell = path.read_text(), folder.cell("cam", "clean").stat().st_mtime_ns
    path.unlink()
    assert run(checked, folder.root) == 0
    assert path.read_text() == before
    assert folder.cell("cam", "clean").stat().st_mtime_ns == cell
    write_report(folder)


def test_an_interpreter_that_cannot_look_is_a_hole_that_the_next_run_fills(
    done: tuple[Recipe, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, folder = done
    folder.audit("wired").unlink()

    def broken(*given: object, **more: object) -> None:
        raise RuntimeError("no such map")

    with monkeypatch.context() as patched:
        patched.setattr(IntegratedGradients, "explain", broken)
        assert run(checked, folder.root) == 1
    looks = json.loads(folder.audit("wired").read_text())["looks"]
    assert ["error" in look for look in looks] == [False, False, True]
    assert "no such map" in (folder.root / PAGE).read_text()
    assert run(checked, folder.root) == 0
    assert "no such map" not in (folder.root / PAGE).read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"manipulations": [{"name": "location-fooling"}]},
            "manipulations[0].of: this key is needed: the interpreter that is",
        ),
        (
            {"manipulations": [{"name": "location-fooling", "of": "rise"}]},
            "no interpreter of the recipe is called 'rise'",
        ),
        ({"manipulations": [{"name": "location-foolng", "of": "cam"}]}, "did you mean 'location-fooling'"),
        ({"manipulations": [{"name": "location-fooling", "of": "cam", "weight": -1}]}, "manipulations[0].weight"),
        ({"manipulations": [{"name": "fool-shap", "of": "cam", "sensitive": 0}]}, "fool-shap is aimed at shap-tabular"),
        ({"defenses": [{"name": "aid", "of": "lying"}]}, "aid can defend rts; 'lying' is cam"),
        (
            {"model": {"name": "small-cnn", "options": {"widths": 3}}},
            "model.options.widths: small-cnn has no such option",
        ),
    ],
)
def test_a_wrong_manipulation_is_refused_with_its_path(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        recipes.check(tree(**changes))
    assert words in str(caught.value)


def test_tables_take_clean_inputs_alone_and_know_their_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    lines = [f"{i % 7},{(i * 5) % 11},{i % 2},{'yes' if i % 7 > 3 else 'no'}" for i in range(90)]
    file.write_text("\n".join(["a,b,secret,label", *lines]))
    pytest.importorskip("pandas")
    told = tree(
        data={"name": "csv-table", "path": str(file), "target": "label"},
        model={"name": "mlp", "train": {"epochs": 1}},
        interpreters=[{"name": "gradient", "of": "logit"}],
        manipulations=[
            {"name": "conceal-feature", "of": "gradient", "feature": "secret", "budget": 1, "label": "hush"}
        ],
        defenses=[],
        attacks=["clean"],
        metrics=["l1", {"name": "feature-rank", "feature": "secret"}],
    )
    checked = recipes.check(told)
    assert run(checked, tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    found = json.loads(folder.audit("hush").read_text())
    assert found["features"] == ["a", "b", "secret"]
    assert found["hidden"] == 2
    figures = found["looks"][0]["figures"]
    assert figures["rank"]["value"] >= figures["rank_before"]["value"]
    with pytest.raises(InputError, match="'pgd' moves the pixels of images"):
        recipes.check_data(recipes.check({**told, "attacks": ["pgd"]}))
    with pytest.raises(InputError, match="sekret"):
        recipes.check_data(recipes.check({**told, "metrics": [{"name": "feature-rank", "feature": "sekret"}]}))


def test_an_interpreter_is_described_by_its_settings_and_those_of_its_parts() -> None:
    model = build("small-cnn", num_classes=3)
    assert described(Smoothed(model, IntegratedGradients(model, n_steps=7)))[2] == [
        described(IntegratedGradients(model, n_steps=7))
    ]
    assert described(IntegratedGradients(model, n_steps=7)) != described(IntegratedGradients(model, n_steps=8))


def test_an_interpreter_made_of_others_moves_to_another_model_whole() -> None:
    first, second = build("small-cnn", num_classes=3, seed=1), build("small-cnn", num_classes=3, seed=2)
    moved = on_model(Smoothed(first, GradCAM(first)), second)
    assert isinstance(moved, Smoothed)
    assert moved.model is second
    assert moved.base.model is second
    steps = on_model(IntegratedGradients(first, n_steps=7), second)
    assert isinstance(steps, IntegratedGradients)
    assert steps.n_steps == 7
