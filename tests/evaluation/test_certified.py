"""Certificates in the matrix: what a cell reports of them, the report's columns and pictures, the command's words."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustexplain.commands.explain import certified_in_words
from robustexplain.errors import InputError
from robustexplain.evaluation import RunFolder, run
from robustexplain.evaluation.certified import certified
from robustexplain.evaluation.report import html
from robustexplain.interpreters import CAM, Certificate
from robustexplain.metrics import Cell
from robustexplain.models import Classifier
from robustexplain.plots import three_colours
from robustexplain.recipe import check_data, read
from robustexplain.system import Explained, System

from .made_up import column, page_of, results_of, row, wins

TINY = Path(__file__).parents[1] / "tiny.yaml"


def seen(*decided: list[int], radius: float = 1.0, overlap: float | None = None) -> Explained:
    """Two inputs whose maps have four cells."""
    marks = torch.tensor(decided, dtype=torch.int8).reshape(2, 2, 2)
    share = None if overlap is None else torch.full((2,), overlap)
    certificate = Certificate(radius, 0.01, marks.float(), None if share is not None else marks, share, 2)
    return Explained(torch.zeros(2, 3), torch.zeros(2, 4, 4), certificate=certificate)


def cell_of(model: Classifier, benign: Explained, attacked: Explained, moved: Tensor) -> Cell:
    clean = torch.zeros(2, 1, 4, 4)
    return Cell(System(model, CAM(model)), clean, clean + moved[:, None, None, None], benign, attacked)


def test_a_cell_says_what_is_certified_and_what_contradicts_it_within_the_radius(trained: Classifier) -> None:
    benign, attacked = seen([1, 0, 0, -1], [1, 1, 1, 1]), seen([1, 1, -1, 0], [0, 0, 0, 0])
    # L2 of a change by v is 4 v: the second input is beyond the radius.
    found = certified(cell_of(trained, benign, attacked, torch.tensor([0.2, 0.3])))
    assert found["certified_one"].tolist() == [0.25, 1.0]
    assert found["certified_zero"].tolist() == [0.5, 0.0]
    assert found["certified_radius"].tolist() == [1.0, 1.0]
    torch.testing.assert_close(found["contradicted"], torch.tensor([0.25, torch.nan]), equal_nan=True)
    assert found["certificate"][0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, -1, -1], [0, 0, -1, -1]]
    # One class's certificate says nothing of an input with another prediction.
    ours, theirs = (replace(e, certificate=replace(e.certificate, same_class=True)) for e in (benign, attacked))  # type: ignore[type-var]
    theirs = replace(theirs, logits=torch.tensor([[0.0, 1.0, 0.0]] * 2))
    found = certified(cell_of(trained, ours, theirs, torch.tensor([0.2, 0.3])))
    assert bool(found["contradicted"].isnan().all())
    plain = Explained(torch.zeros(2, 3), torch.zeros(2, 4, 4))
    assert certified(cell_of(trained, plain, plain, torch.zeros(2))) == {}
    tops = [seen([3, 2, 1, 0], [3, 2, 1, 0], overlap=0.5), seen([3, 0, 2, 1], [0, 1, 2, 3], overlap=0.5)]
    found = certified(cell_of(trained, *tops, torch.tensor([0.2, 0.2])))
    assert found["certified_overlap"].tolist() == [0.5, 0.5]
    assert found["attacked_overlap"].tolist() == [0.5, 0.0]
    assert "certificate" not in found
    assert certified_in_words(tops[0].certificate) == "50.0% of its top stays at least, within L2 1"  # type: ignore[arg-type]
    said = certified_in_words(seen([1, 0, 0, -1], [1, 1, 1, 1], radius=0).certificate)  # type: ignore[arg-type]
    assert said.startswith("25.0% of the map is certified as important, 50.0% as unimportant at least, under the noise")


def test_the_report_has_columns_for_certificates_and_draws_them(tmp_path: Path) -> None:
    rows, columns = (
        [row("plain"), row("proved", "plain")],
        [column("clean", name="Clean"), column("strong", "adaptive")],
    )
    pictures = {
        **{name: torch.zeros(2, 1, 8, 8) for name in ("x", "attacked_x")},
        **{name: torch.rand(2, 8, 8) for name in ("map", "attacked_map")},
        "label": torch.tensor([0, 1]),
        "prediction": torch.tensor([1, 1]),
    }
    marks = {"certificate": torch.ones(2, 8, 8), "attacked_certificate": -torch.ones(2, 8, 8)}
    shares = {"certified_one": torch.full((40,), 0.125), "certified_radius": torch.full((40,), 0.1)}
    arrays = {(r.label, c.label): {**wins(0), **pictures} for r in rows for c in columns}
    without = html(page_of(results_of(rows, columns, arrays), arrays, tmp_path))
    assert "Certified" not in without
    for c in columns:
        arrays["proved", c.label] |= shares | marks
    drawn = html(page_of(results_of(rows, columns, arrays), arrays, tmp_path))
    costs = drawn[drawn.index("What each row costs") :].split("</table>")[0]
    assert "Certified as important</th>" in costs
    assert "Radius of the certificate</th>" in costs
    assert "Certified overlap" not in costs
    assert costs.count("0.125<small>") == 1
    assert drawn.count("<title>what is certified of the benign map</title>") == 4
    assert len({tuple(c) for c in three_colours(torch.tensor([[1, 0, -1]]))[0].tolist()}) == 3


@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_a_run_measures_certificates_and_an_adaptive_attacker_goes_through_them(tmp_path: Path) -> None:
    recipe = read(
        TINY,
        [
            "interpreters=[cam]",
            "defenses=[{name: certified, of: cam, samples: 20, choose: 4, grid: 4, keep: 0.3, alpha: 0.2, tau: 0.6}]",
            "attacks=[clean, {name: adv2, eps: 0.1, steps: 2, knowledge: adaptive}]",
            "evaluation.images=4",
            "evaluation.plausible={iou: 0.5}",
        ],
    )
    assert run(recipe, tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    (label,) = [r.label for r in recipe.rows if r.kind == "defense"]
    (attack,) = [c.label for c in recipe.columns if c.knowledge == "adaptive"]
    cell, arrays = folder.done(label, attack), folder.arrays(label, attack)
    assert cell is not None
    assert arrays["certificate"].shape == (2, 16, 16)
    assert float(arrays["certified_one"].max()) > 0
    assert not arrays["zero_direction"].any()
    with (tmp_path / "run/matrix.csv").open() as file:
        measures = {line["measure"] for line in csv.DictReader(file) if line["row"] == label}
    assert {"certified_one", "certified_zero", "certified_radius", "contradicted"} <= measures


def test_a_recipe_with_too_few_draws_is_refused_before_anything_is_trained() -> None:
    wanted = "defenses=[{name: certified, of: cam, samples: 40}, {name: sparsified-smoothgrad, of: cam, grid: 20}]"
    with pytest.raises(InputError) as caught:
        check_data(read(TINY, [wanted]))
    assert "'certified (cam)'" in str(caught.value)
    assert "samples must be at least 54" in str(caught.value)
    assert "grid: must be 2 to 16 cells a side" in str(caught.value)
