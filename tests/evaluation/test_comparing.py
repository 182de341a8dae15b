"""Runs against each other: what changed beyond chance, and the leaderboard, as functions and as commands."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import Tensor
from typer.testing import CliRunner

from robustexplain.attacks import PGD, Attack, Clean, Substitute
from robustexplain.attacks.adaptive import Adaptation
from robustexplain.cli import app
from robustexplain.errors import InputError
from robustexplain.evaluation import RunFolder, evaluate
from robustexplain.evaluation.comparing import Side, compare, unpaired
from robustexplain.evaluation.leaderboard import boards
from robustexplain.evaluation.worst import WORST
from robustexplain.interpreters import CAM, Gradient
from robustexplain.models import Classifier
from robustexplain.recipe.experiment import AttackFacts, Column, Evaluation
from robustexplain.system import System

from .made_up import column, results_of, row, wins

ROWS, COLUMNS = [row("plain"), row("shield", "plain")], [column("clean", name="Clean"), column("a"), column("b")]


def side(columns: list[Column] = COLUMNS, data: str = "same", **won: range) -> Side:
    """A run in which these samples of each row fell to attacker ``a``, and none to the others."""
    arrays: dict[tuple[str, str], dict[str, Tensor]] = {
        (r.label, c.label): wins(*(won.get(r.label, range(0)) if c.label == "a" else ())) for r in ROWS for c in columns
    }
    return Side(results_of(ROWS, columns, arrays, {"data": data}), {0: arrays}, {})


def test_a_change_is_one_that_the_corrected_paired_test_says() -> None:
    found = compare(side(plain=range(40), shield=range(20)), side(plain=range(40), shield=range(11)))
    by = {(c.row, c.column): c for c in found.changes}
    assert len(by) == 8
    moved = by["shield", "a"]
    assert (moved.before, moved.after, moved.paired) == (0.5, 0.275, True)
    # Nine samples changed, all in one direction: McNemar's exact p, times the eight comparisons at most.
    assert moved.found.p == pytest.approx(2 * 0.5**9)
    assert moved.p == pytest.approx(min(8 * 2 * 0.5**9, 1))
    assert moved.beyond_chance
    assert by["shield", WORST].found.value == pytest.approx(-9 / 40)
    assert sum(c.beyond_chance for c in found.changes) == 2
    few = compare(side(shield=range(20)), side(shield=range(15)))
    assert not any(c.beyond_chance for c in few.changes)


def test_of_runs_of_several_seeds_a_change_is_one_over_all_of_them() -> None:
    def several(*falls: int) -> Side:
        sides = [side(plain=range(40), shield=range(n)) for n in falls]
        return replace(sides[0], seeds={i: one.seeds[0] for i, one in enumerate(sides)})

    found = compare(several(38, 40, 39), several(10, 12, 11))
    moved = next(c for c in found.changes if (c.row, c.column) == ("shield", "a"))
    assert (moved.seeds, moved.before, moved.after) == (3, pytest.approx(39 / 40), pytest.approx(11 / 40))
    assert moved.beyond_chance
    # One training alone would say so; the others do not.
    assert compare(several(38), several(10)).changes[-1].seeds == 1
    lucky = compare(several(38, 20, 20), several(10, 22, 20)).changes
    assert not any(c.beyond_chance for c in lucky)
    other = compare(several(38, 40, 39), replace(several(10, 12, 11), results=side(data="other").results)).changes
    moved = next(c for c in other if (c.row, c.column) == ("shield", "a"))
    assert not moved.paired
    assert moved.found.low is not None
    assert moved.found.low >= -1
    assert moved.beyond_chance


def test_other_inputs_are_compared_as_two_samples() -> None:
    found = compare(side(shield=range(30)), side(data="other", shield=range(10)))
    moved = next(c for c in found.changes if (c.row, c.column) == ("shield", "a"))
    assert not moved.paired
    assert moved.found.p == pytest.approx(scipy.stats.fisher_exact([[10, 30], [30, 10]])[1])
    assert ("data", "same", "other") in found.settings


def test_the_interval_of_two_samples_is_newcombes() -> None:
    # Newcombe 1998, table II, case (a): 56 of 70 against 48 of 80.
    one, other = (torch.cat([torch.ones(hits), torch.zeros(n - hits)]) for hits, n in ((56, 70), (48, 80)))
    found = unpaired(one, other, binary=True)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    means = unpaired(torch.linspace(0, 1, 30), torch.linspace(0.5, 1.5, 20), binary=False)
    assert means.low is not None
    assert means.high is not None
    assert means.low < -0.5 < means.high < 0
    assert means.p is not None
    assert means.p < 0.01


def test_the_worst_case_is_over_the_attackers_that_both_runs_have() -> None:
    more = [*COLUMNS[:1], column("a"), column("c")]
    found = compare(side(shield=range(5)), side(more, shield=range(5)))
    assert {c.column for c in found.changes} == {"clean", "a", WORST}
    assert found.alone == {"columns of the first alone": ["b"], "columns of the second alone": ["c"]}
    with pytest.raises(InputError, match="no figure in common"):
        compare(side(), side(), measure="l7")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Classifier, grey: Tensor) -> dict[str, Path]:
    """A system under attacks of one radius, of another, and of the first one again."""
    root = tmp_path_factory.mktemp("runs")
    x, y = grey.repeat(2, 1, 1, 1)[:8], torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    settings = Evaluation(images=8, batch_size=8, calibration=20, only_correct=False, bootstrap=50, pictures=1)
    gradient, cam = Gradient(tiny_model), CAM(tiny_model)
    for name, eps, method in (("weak", 0.01, gradient), ("strong", 0.3, gradient), ("again", 0.01, cam)):
        attacks = {"clean": Clean(), "pgd": PGD(eps=eps, steps=3)}
        evaluate({"mine": System(tiny_model, method)}, attacks, (x, y), out=root / name, evaluation=settings)
    return {path.name: path for path in root.iterdir()}


def test_only_what_was_measured_in_the_same_way_is_ranked_together(runs: dict[str, Path]) -> None:
    found = boards([RunFolder(path) for path in runs.values()])
    assert [sorted(e.folder.root.name for e in board.entries) for board in found] == [["again", "weak"], ["strong"]]
    first = found[0].entries
    assert [e.case.share.value for e in first] == sorted(e.case.share.value or 0 for e in first)
    assert first[0].flags[1] == 2


def test_the_commands(runs: dict[str, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "board.html"
    done = runner.invoke(app, ["leaderboard", *map(str, runs.values()), "--out", str(out)])
    assert done.exit_code == 0, done.output
    page = out.read_text()
    assert "pgd (eps 0.01, 3 steps)" in page
    assert "pgd (eps 0.3, 3 steps)" in page
    assert page.count("<tbody>") == 2
    assert "report.html" in page
    done = runner.invoke(
        app,
        [
            "diff",
            str(runs["weak"]),
            str(runs["strong"]),
            "--all",
            "--measure",
            "success",
            "--out",
            str(tmp_path / "d.csv"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "figures changed beyond chance; all of them are compared on the same inputs" in done.output
    assert "column made otherwise" in done.output
    with (tmp_path / "d.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["column"], line["made otherwise"]) for line in lines} == {("clean", ""), ("pgd", "column")}
    empty = tmp_path / "nothing"
    empty.mkdir()
    assert runner.invoke(app, ["diff", str(runs["weak"]), str(empty)]).exit_code != 0
    shutil.rmtree(empty)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PGD(0.1, adapt=Adaptation(draws=1)), PGD(0.1, adapt=Adaptation(draws=100))),
        (PGD(0.1, step_size=0.01), PGD(0.1, step_size=0.02)),
        (Substitute(craft=PGD(0.01)), Substitute(craft=PGD(0.3))),
    ],
)
def test_attacks_of_other_settings_are_of_another_family(one: Attack, other: Attack) -> None:
    assert AttackFacts.of(one).family == AttackFacts.of(replace(one)).family
    assert AttackFacts.of(one).family != AttackFacts.of(other).family


def test_attacks_that_differ_in_radius_and_steps_are_of_one_family() -> None:
    assert AttackFacts.of(PGD(0.1, steps=3)).family == AttackFacts.of(PGD(0.2, steps=5)).family
