"""Whom an adversary attacks, with whose images, and what counts as its success: what columns of the matrix may say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from robustexplain.attacks import Attack, Linf, Plan, SearchResult
from robustexplain.errors import InputError, RobustExplainWarning
from robustexplain.evaluation import Results, RunFolder, run
from robustexplain.evaluation.doubts import doubts
from robustexplain.objectives import Goal, Objective, Sum
from robustexplain.random_streams import Streams
from robustexplain.recipe import check_data, read
from robustexplain.registry import ATTACKS
from robustexplain.system import System

TINY = Path(__file__).parents[1] / "tiny.yaml"


@dataclass(frozen=True)
class _Add(Plan):
    """Adds something, and says how it went."""

    delta: Tensor
    stalled: bool = False
    threat: ClassVar[Linf] = Linf(1.0)
    aim: ClassVar[Objective] = Sum()
    summary: ClassVar[str] = "adds"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        none = torch.full((len(goal.x),), self.stalled)
        return SearchResult.of((goal.x + self.delta).clamp(0, 1), queries=7, stalled=none)


@dataclass(frozen=True)
class OwnImages(Attack):
    """Adds the mean of the adversary's own images."""

    mean: float | None = None
    needs_data: ClassVar[bool] = True

    def fitted(self, system: System, x: Tensor, y: Tensor) -> Attack:
        return replace(self, mean=float(x.mean()))

    def plan(self, system: System) -> Plan:
        if self.mean is None:
            raise InputError("not fitted")
        return _Add(torch.tensor(self.mean))


@dataclass(frozen=True)
class Vain(Attack):
    """Changes nothing and says so; after the explanation alone."""

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True
    moves_map: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        return _Add(torch.zeros(()), stalled=True)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    ATTACKS._load()
    before = dict(ATTACKS._entries)
    ATTACKS.register("own-images")(OwnImages)
    ATTACKS.register("vain")(Vain)
    yield
    ATTACKS._entries.clear()
    ATTACKS._entries.update(before)


def results_of(root: Path, *changes: str) -> tuple[RunFolder, Results]:
    recipe = read(TINY, ["interpreters=[cam, gradcam]", "defenses=[]", "model.train.epochs=1", *changes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        assert run(recipe, root) == 0
    return RunFolder(root), Results.read(RunFolder(root))


def test_inputs_crafted_on_another_row_are_judged_on_every_row(tmp_path: Path) -> None:
    attack = "{name: adv2, eps: 0.2, steps: 4, step_size: 0.1, source: [cam, gradcam]}"
    folder, results = results_of(tmp_path, f"attacks=[{attack}, {{name: adv2, eps: 0.2, steps: 4, step_size: 0.1}}]")
    assert [c.label for c in results.recipe.columns] == ["adv2, from cam", "adv2, from gradcam", "adv2"]
    for source in ("cam", "gradcam"):
        own = folder.arrays(source, "adv2")["attacked_x"]
        for row in ("cam", "gradcam"):
            assert torch.equal(folder.arrays(row, f"adv2, from {source}")["attacked_x"], own)
    assert not torch.equal(folder.arrays("cam", "adv2")["attacked_x"], folder.arrays("gradcam", "adv2")["attacked_x"])


def test_a_source_that_is_no_row_is_refused() -> None:
    with pytest.raises(InputError, match=r"attacks\[0\].source: no row of the recipe is called 'kam'; it has cam, rts"):
        read(TINY, ["attacks=[{name: adv2, source: kam}]"])


def test_an_attack_is_fitted_on_images_that_nobody_judges(tmp_path: Path) -> None:
    folder, results = results_of(tmp_path, "attacks=[own-images]", "evaluation.pool=30")
    loaded = check_data(results.recipe)
    means = [float(loaded.defense[i][0].mean()) for i in range(len(loaded.defense))]  # type: ignore[arg-type]
    arrays = folder.arrays("cam", "own-images")
    added = (arrays["attacked_x"] - arrays["x"])[arrays["attacked_x"] < 1]
    assert min(means) < float(added.mean()) < max(means)
    torch.testing.assert_close(added, added.mean().expand_as(added))
    assert results.measure("cam", "own-images", "queries")["value"] == 7  # type: ignore[index]


def test_without_images_of_the_adversarys_own_an_attack_that_needs_them_is_refused_before_anything_runs() -> None:
    recipe = read(TINY, ["attacks=[own-images]", "data.fractions=[0, 0, 1]"])
    with pytest.raises(InputError, match="'own-images' needs images of the adversary's own"):
        check_data(recipe)


def test_an_attack_on_the_explanation_alone_wins_where_the_prediction_stays_and_the_map_does_not(
    tmp_path: Path,
) -> None:
    folder, _ = results_of(tmp_path, "attacks=[vain]")
    arrays = folder.arrays("cam", "vain")
    assert bool((arrays["success"] == 1).all())
    assert bool((arrays["goal_class"] == arrays["prediction"]).all())
    assert bool((arrays["plausible"] == 0).all())
    assert bool((arrays["joint"] == 0).all())


def test_a_search_that_says_it_failed_puts_its_cell_in_doubt(tmp_path: Path) -> None:
    folder, results = results_of(tmp_path, "attacks=[vain]")
    said = "; ".join(doubts(results)["cam", "vain"])
    assert "the search never got its objective below where it began, for" in said
    assert "never got its objective below" in (folder.root / "report.html").read_text()
