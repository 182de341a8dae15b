"""The scripts that check the measure: each notices what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robustexplain import interpreters, models
from robustexplain.evaluation.calibration import conformal_quantile
from robustexplain.recipe import check_data, read
from robustexplain.system import System

from ..benchmarks.calibration_holds import Line, Promise, fresh_inputs, lines
from ..benchmarks.false_flags import Raised, as_markdown
from ..benchmarks.reference_table import differs, far

TINY = Path(__file__).parents[1] / "tiny.yaml"


def test_promise_is_what_a_split_conformal_quantile_keeps() -> None:
    promise, draws = Promise(100, 0.95), torch.rand(4000, 100, generator=torch.Generator().manual_seed(0))
    assert (promise.above, round(promise.expected, 4)) == (5, 0.0495)
    # Of uniform values the share beyond a limit is one less it.
    shares = torch.tensor([1 - conformal_quantile(row, 0.95) for row in draws])
    low, high = promise.one()
    assert abs(float(shares.mean()) - promise.expected) < 0.002
    assert abs(float(((shares < low) | (shares > high)).float().mean()) - 0.05) < 0.015
    # Few fresh inputs vary more than the calibration; very many do not.
    assert promise.of(50)[1] > promise.of(100_000)[1] == pytest.approx(high, abs=1e-3)
    assert promise.plain(1000)[1] < promise.of(1000)[1]


def test_limit_that_is_too_small_is_noticed() -> None:
    distance = torch.linspace(0, 1, 100)
    arrays = {"change": torch.zeros(100), "kept": torch.ones(100), "distance": distance, "sample": torch.arange(100)}
    known = {"harmless": [{"name": "noise"}], "limit_by": [0.95], "limit": 0.95, "quantile": 0.95}
    good = list(lines("row", known, arrays, arrays))
    bad = list(lines("row", {**known, "limit_by": [0.5], "limit": 0.5}, arrays, arrays))
    assert [line.held(line.promise.of(line.inputs)) for line in good] == [True, True]
    assert [line.held(line.promise.of(line.inputs)) for line in bad] == [False, False]
    cautious = Line("row", "row's limit", "noise", 1000, 1000, 0.0, Promise(100, 0.95))
    assert cautious.held(cautious.promise.of(1000))


def test_fresh_inputs_are_neither_used_nor_trained_on() -> None:
    recipe = read(TINY, ["evaluation.only_correct=false"])
    data, used = check_data(recipe), set(range(1300))
    model = models.build("small-cnn", num_classes=10, in_channels=1)
    root = System(model, interpreters.CAM(model))
    plain, trained = recipe.row("cam"), recipe.row("x-ensemble (cam)")
    # Digits in these parts: 1347 to test, 180 to defenses.
    numbers, x = fresh_inputs(recipe, plain, root, data, used, most=2000)
    assert len(x) == len(numbers.unique()) == 47 + 180
    assert not used & set(numbers.tolist())
    assert len(fresh_inputs(recipe, trained, root, data, used, most=2000)[0]) == 47
    assert len(fresh_inputs(recipe, plain, root, data, used, most=20)[0]) == 20


def test_differences_beyond_chance() -> None:
    assert differs(0.13, 0.30)
    assert not differs(0.13, 0.20)
    assert far(0.05, 0.055, 0.065, 0.06)
    assert not far(0.055, 0.05, 0.07, 0.06)


def test_false_flags_are_counted_by_cell() -> None:
    true = Raised("run", "gradient", "pgd", "few-steps", "few", "few")
    false = [Raised("run", "cam", "pgd", name, "why") for name in ("stalled", "zero-gradient")]
    text = as_markdown(200, [true, *false])
    assert "200 cells, 2 flagged; with a false flag 1: 0.005" in text
    assert text.count("**not raised**") == 2
