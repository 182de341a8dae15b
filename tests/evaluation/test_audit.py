"""Manipulated systems in a recipe: rows that defenses may stand on, an audit of each, and the page that shows it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustexplain import data as data_sets
from robustexplain import recipe as recipes
from robustexplain.attacks.joint.member_maps import MemberMaps
from robustexplain.attacks.manipulation import ConcealFeature, View
from robustexplain.commands.explain import systems_of_run
from robustexplain.errors import InputError
from robustexplain.evaluation import Results, RunFolder, run, write_report
from robustexplain.evaluation.audit import Audit, audit
from robustexplain.evaluation.audit_page import PAGE, TABLE
from robustexplain.evaluation.origins import Origins
from robustexplain.evaluation.prepared import Prepared
from robustexplain.interpreters import CAM, GradCAM, IntegratedGradients, Smoothed
from robustexplain.metrics import SSIM, Entropy, FooledLocation, LocationCorrelation, Pearson, SignCorrelation, Spearman
from robustexplain.models import build
from robustexplain.recipe.experiment import Recipe, Row
from robustexplain.system import System, described, on_model
from robustexplain.training import Session

TUNED = {"epochs": 2, "batch_size": 32, "lr": 1e-3, "weight_decay": 0}


def tree(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "lies",
        "data": {"name": "digits", "size": 16, "fractions": [0.4, 0.1, 0.5]},
        "model": {"name": "small-cnn", "train": {"epochs": 2, "lr": 1e-2}},
        "interpreters": ["cam", {"name": "integrated-gradients", "steps": 2, "label": "ig"}],
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
        "attacks": ["clean", {"name": "pgd", "steps": 2, "knowledge": ["oblivious", "transfer"]}],
        "evaluation": {"images": 12, "batch_size": 6, "bootstrap": 50, "pictures": 2},
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
    results = Results.read(folder)
    assert "What the owners hide" in (folder.root / "report.html").read_text()
    assert results.audits["lying"]["looks"]
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


def test_an_audit_is_made_of_every_row_that_looks() -> None:
    def made_of(**changes: Any) -> str:
        defense = {"name": "beta-smoothing", "of": "ig", "label": "smooth", **changes}
        return Origins(recipes.check(tree(defenses=[defense]))).audit("lying")

    assert made_of() == made_of()
    assert len({made_of(), made_of(beta=2.0), Origins(recipes.check(tree(defenses=[]))).audit("lying")}) == 3


def an_audit(label: str = "lying", honest: System | None = None, lied: System | None = None) -> Audit:
    """The audit of a row of the recipe that was never run; seed 5, on two systems of one model each."""
    checked = recipes.check(tree(seed=5))
    found = {} if honest is None or lied is None else {"cam": honest, "ig": ig_of(honest), label: lied}
    row = next(row for row in checked.rows if row.label == label)
    prepared = Prepared(found)
    return Audit(checked, row, prepared, checked.data.load(), RunFolder(Path("nowhere")), Session())


def ig_of(system: System) -> System:
    return System(system.model, IntegratedGradients(system.model, steps=2))


def nets() -> tuple[nn.Module, nn.Module]:
    first, second = (build("small-cnn", num_classes=3, in_channels=1, seed=seed).eval() for seed in (1, 2))
    with torch.no_grad():
        for net in (first, second):
            net.net.head.weight.mul_(20)  # type: ignore[union-attr, operator]
    return first, second


def test_the_figures_of_a_look_are_those_of_the_honest_and_of_the_manipulated_model() -> None:
    first, second = nets()
    true, false = CAM(first), CAM(second)
    rng = torch.Generator().manual_seed(0)
    x, base = torch.rand(2, 8, 1, 16, 16, generator=rng)
    explained, answer, honest_class = torch.randint(3, (3, 8), generator=rng)
    with torch.no_grad():
        before = true.explain(base, honest_class, native=True).maps
        now = false.explain(x, explained, native=True).maps
        goal = torch.rand(before.shape, generator=rng)
        view = View(x, explained, answer, goal, honest_x=base, honest_class=honest_class)
        found, shown = an_audit()._chunk(true, false, view)
        said = [(net(x).argmax(1) == answer).float() for net in (second, first)]
    assert not torch.equal(*said)
    wanted = {
        "answered": said[0],
        "answered_before": said[1],
        "sign_correlation": SignCorrelation()(now, before),
        "spearman": Spearman()(now, before),
        "ssim": SSIM()(now, before),
        "location": LocationCorrelation()(now),
        "location_before": LocationCorrelation()(before),
        "entropy": Entropy()(now),
        "entropy_before": Entropy()(before),
        "ssim_goal": SSIM()(now, goal),
        "ssim_goal_before": SSIM()(before, goal),
        "pearson_goal": Pearson()(now, goal),
        "test_loss": FooledLocation()(now, before, goal),
        "test_loss_before": FooledLocation()(before, before, goal),
        "fooled": FooledLocation().success(FooledLocation()(now, before, goal)).float(),
        "fooled_before": FooledLocation().success(FooledLocation()(before, before, goal)).float(),
    }
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, equal_nan=True, msg=name)
    for name, value in {"x": x, "before": before, "now": now}.items():
        assert torch.equal(shown[name], value)


def test_a_hidden_column_has_its_rank_before_and_now() -> None:
    attack = ConcealFeature(feature="secret")
    row = Row("hush", "gradient", "conceal-feature", attack, "gradient", "manipulation")
    data = data_sets.tables.table(
        "rows", torch.rand(6, 3), [0, 1] * 3, classes=("no", "yes"), features=("a", "b", "secret")
    )
    prepared = Prepared()
    audit = Audit(recipes.check(tree()), row, prepared, data, RunFolder(Path("nowhere")), Session())
    before, now = torch.tensor([[1.0, 2, -3], [1, 3, 2]]), torch.tensor([[2.0, 3, 1], [1, 2, -4]])
    found = {name: value.tolist() for name, value in audit._hidden(before, now).items()}
    assert found == {"rank": [3, 1], "rank_before": [1, 2], "first": [0, 1], "first_before": [1, 0]}


def test_inputs_are_of_the_judge_part_by_the_seed_of_the_recipe() -> None:
    audit = an_audit()
    x, y = data_sets.stack(data_sets.take(audit.data.test, 12, 5))
    assert torch.equal(audit._inputs()[0], x)
    assert torch.equal(audit._inputs()[1], y)


def test_other_interpreters_look_at_the_manipulated_model_unless_the_model_is_the_honest_one() -> None:
    first, second = nets()
    honest, lied = System(first, CAM(first)), System(second, CAM(second))
    looks = an_audit(honest=honest, lied=lied)._interpreters(honest, lied)
    assert [(label, true.model is first, false.model is second) for label, true, false in looks] == [
        ("cam", True, True),
        ("ig", True, True),
    ]
    said = System(first, GradCAM(first))
    assert an_audit(honest=honest, lied=said)._interpreters(honest, said) == [
        ("cam", honest.interpreter, said.interpreter)
    ]


def test_processes_share_the_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = nets()
    system, checked = System(first, CAM(first)), recipes.check(tree())
    prepared = Prepared({"cam": system, "lying": system, "wired": system})
    written: list[tuple[int, str]] = []

    class Process:
        """What one of two processes knows of the other."""

        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index = index

        def wait_for_everyone(self) -> None:
            pass

    monkeypatch.setattr(
        Audit, "write", lambda self: written.append((self.session.accelerator.process_index, self.row.label))
    )
    for index in (0, 1):
        session = Session(accelerator=Process(index))  # type: ignore[arg-type]
        assert audit(checked, prepared, checked.data.load(), RunFolder(tmp_path), session) == 2
    assert written == [(0, "lying"), (1, "wired")]


def test_page_and_table_show_every_manipulation(done: tuple[Recipe, RunFolder]) -> None:
    _, folder = done
    page = (folder.root / PAGE).read_text()
    for words in ("lying", "wired", "What transfers", "with the trigger", "Sign correlation with the honest map"):
        assert words in page
    assert 'src="http' not in page
    assert "<script src" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    lines = list(csv.DictReader((folder.root / TABLE).read_text().splitlines()))
    assert {line["manipulation"] for line in lines} == {"lying", "wired"}
    report = (folder.root / "report.html").read_text()
    assert PAGE in report
    assert report.index("What the owners hide") < report.index("The matrix:")
    assert "“lying” was manipulated by its owner so that it hides what “cam” shows; fooling success rate: " in report
    # No attacker on inputs measures them: nothing of theirs is coloured as safe.
    matrix = report.partition('<table class="sortable matrix">')[2].partition("</table>")[0]
    lines = {line.split(">", 1)[1].split("<")[0]: line for line in matrix.split('<th scope="row"')[1:]}
    assert "t-risk" in lines["cam"]
    assert all("t-risk" not in lines[label] for label in ("lying", "wired", "smoothed lie"))


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
            "manipulations[0].of: this key is needed: the row that is",
        ),
        (
            {"manipulations": [{"name": "location-fooling", "of": "rise"}]},
            "no earlier row of the recipe is called 'rise'",
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


@pytest.fixture(scope="module")
def on_a_table(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], RunFolder]:
    """A recipe on a table of three columns, and its run."""
    pytest.importorskip("pandas")
    out = tmp_path_factory.mktemp("table")
    lines = [f"{i % 7},{(i * 5) % 11},{i % 2},{'yes' if i % 7 > 3 else 'no'}" for i in range(90)]
    (out / "rows.csv").write_text("\n".join(["a,b,secret,label", *lines]))
    told = tree(
        data={"name": "csv-table", "path": str(out / "rows.csv"), "target": "label"},
        model={"name": "mlp", "train": {"epochs": 1}},
        interpreters=[{"name": "gradient", "of": "logit"}],
        manipulations=[
            {"name": "conceal-feature", "of": "gradient", "feature": "secret", "budget": 1, "label": "hush"}
        ],
        defenses=[],
        attacks=["clean"],
        metrics=["l1", {"name": "feature-rank", "feature": "secret"}],
    )
    assert run(recipes.check(told), out / "run") == 0
    return told, RunFolder(out / "run")


def test_tables_take_clean_inputs_alone_and_know_their_columns(on_a_table: tuple[dict[str, Any], RunFolder]) -> None:
    told, folder = on_a_table
    found = json.loads(folder.audit("hush").read_text())
    assert found["features"] == ["a", "b", "secret"]
    assert found["hidden"] == 2
    figures = found["looks"][0]["figures"]
    assert figures["rank"]["value"] >= figures["rank_before"]["value"]
    with pytest.raises(InputError, match="'pgd' moves the pixels of images"):
        recipes.check_data(recipes.check({**told, "attacks": ["pgd"]}))
    with pytest.raises(InputError, match="sekret"):
        recipes.check_data(recipes.check({**told, "metrics": [{"name": "feature-rank", "feature": "sekret"}]}))
    rule = {"name": "feature-rule", "options": {"columns": ["secret"]}}
    assert recipes.check_data(recipes.check({**told, "model": rule})).features[2] == "secret"
    with pytest.raises(InputError, match=r"model\.options.*sekret"):
        recipes.check_data(recipes.check({**told, "model": {**rule, "options": {"columns": ["sekret"]}}}))


def test_the_page_speaks_of_rows_where_the_data_are_a_table(
    done: tuple[Recipe, RunFolder], on_a_table: tuple[dict[str, Any], RunFolder]
) -> None:
    rows, images = ((folder.root / PAGE).read_text() for folder in (on_a_table[1], done[1]))
    assert "12 judged rows at most" in rows
    assert "12 judged images at most" in images
    assert "95% intervals over rows" in rows
    assert "95% intervals over images" in images


def test_systems_of_a_table_explain_no_image(on_a_table: tuple[dict[str, Any], RunFolder]) -> None:
    _, folder = on_a_table
    with pytest.raises(InputError, match="take rows of 3 columns and no image") as caught:
        systems_of_run(folder.root, ["gradient"])
    assert repr(str(folder.system("gradient"))) in str(caught.value)
    assert System.load(folder.system("gradient"))(torch.rand(2, 3)).maps.shape == (2, 3)


def test_an_interpreter_is_described_by_its_settings_and_those_of_its_parts() -> None:
    model = build("small-cnn", num_classes=3)
    assert described(Smoothed(model, IntegratedGradients(model, steps=7)))[2] == [
        described(IntegratedGradients(model, steps=7))
    ]
    assert described(IntegratedGradients(model, steps=7)) != described(IntegratedGradients(model, steps=8))


def test_an_interpreter_made_of_others_moves_to_another_model_whole() -> None:
    first, second = build("small-cnn", num_classes=3, seed=1), build("small-cnn", num_classes=3, seed=2)
    moved = on_model(Smoothed(first, GradCAM(first)), second)
    assert isinstance(moved, Smoothed)
    assert moved.model is second
    assert moved.base.model is second
    several = on_model(MemberMaps(first, (GradCAM(first), CAM(first))), second)
    assert isinstance(several, MemberMaps)
    assert several.model is second
    assert [(type(member), member.model is second) for member in several.members] == [(GradCAM, True), (CAM, True)]
    steps = on_model(IntegratedGradients(first, steps=7), second)
    assert isinstance(steps, IntegratedGradients)
    assert steps.steps == 7
