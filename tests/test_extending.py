"""A user's own attack, interpreter and metric: a few lines each, and they are listed, named in recipes and run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain.attacks import Attack, Linf, Plan, Search, SignStep, Stage
from robustexplain.commands.list import markdown, rows_of
from robustexplain.errors import InputError
from robustexplain.evaluation import RunFolder, run
from robustexplain.fields import Count, Eps, NonNegative, Positive
from robustexplain.interpreters import Explanation, Interpreter
from robustexplain.metrics import MapMetric
from robustexplain.objectives import Goal, Misclassify, Objective, Observation
from robustexplain.recipe import check, read
from robustexplain.registry import ATTACKS, INTERPRETERS, METRICS
from robustexplain.system import System

TINY = Path(__file__).parent / "tiny.yaml"


# ---- what the user writes ----


@dataclass(frozen=True)
class Blind(Objective):
    """Empty the map: the mean of its squares."""

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})
    constraint: ClassVar[bool] = False

    def loss(self, seen: Observation, goal: Goal) -> Tensor:
        assert seen.maps is not None
        return seen.maps.square().flatten(1).mean(1)


@dataclass(frozen=True)
class Blinding(Attack):
    """Misclassify, and empty the map.

    Args:
        eps: radius of the ball.
        steps: iterations.
        weight: of the map's loss.
    """

    eps: Eps = 8 / 255
    steps: Count = 20
    step_size: Positive = 2 / 255
    weight: NonNegative = 1.0

    needs_maps: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        stage = Stage(Misclassify() + self.weight * Blind(), self.steps, SignStep(self.step_size))
        return Search(Linf(self.eps), (stage,))


@dataclass(frozen=True, eq=False)
class Occlusion(Interpreter):
    """How much the class's logit falls where the image is greyed out, in ``grid`` by ``grid`` patches."""

    grid: Count = 4

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = self.model(x)
        classes = logits.argmax(1) if target is None else target
        falls = []
        for cell in torch.eye(self.grid**2, device=x.device, dtype=x.dtype).reshape(-1, 1, 1, self.grid, self.grid):
            mask = F.interpolate(cell, x.shape[-2:])
            falls.append((logits - self.model(x * (1 - mask) + 0.5 * mask)).gather(1, classes[:, None]))
        return Explanation(logits, torch.cat(falls, 1).reshape(-1, self.grid, self.grid))


@dataclass(frozen=True)
class PeakShift(MapMetric):
    """How far the map's largest value moved, in pixels."""

    higher_is_closer: ClassVar[bool] = False

    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        width = maps.shape[-1]
        a, b = maps.flatten(1).argmax(1), reference.flatten(1).argmax(1)
        return torch.hypot((a // width - b // width).float(), (a % width - b % width).float())


# ---- what the user gets ----


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The three under their names, for the length of a test."""
    mine = [
        (ATTACKS, "blinding", Blinding),
        (INTERPRETERS, "grey-patches", Occlusion),
        (METRICS, "peak-shift", PeakShift),
    ]
    for registry, name, cls in mine:
        registry.register(name, paper="The user 2026", needs=("courage",))(cls)
    yield
    for registry, name, _ in mine:
        del registry._entries[name]


def test_each_takes_fewer_than_forty_lines() -> None:
    for classes in ((Blind, Blinding), (Occlusion,), (PeakShift,)):
        assert sum(len(inspect.getsource(cls).splitlines()) for cls in classes) < 40


@pytest.mark.parametrize(
    "kind,name,summary,settings",
    [
        ("attacks", "blinding", "Misclassify, and empty the map.", "steps=20"),
        ("interpreters", "grey-patches", "How much the class's logit falls", "grid=4"),
        ("metrics", "peak-shift", "How far the map's largest value moved", ""),
    ],
)
def test_it_is_listed_like_the_built_in_ones(kind: str, name: str, summary: str, settings: str) -> None:
    row = next(row for row in rows_of(kind) if row[0] == name)
    assert row[1].startswith(summary)
    assert row[2:4] == ("The user 2026", "courage")
    assert settings in row[4]
    assert f"`{name}`" in markdown(kind)


def test_its_fields_are_the_schema_of_its_entry() -> None:
    tree = read(TINY).source
    with pytest.raises(InputError) as error:
        check({**tree, "attacks": [{"name": "blinding", "wait": 1}, {"name": "blinding", "eps": 300, "label": "b"}]})
    assert "attacks[0].wait: unknown key; did you mean" in str(error.value)
    assert "attacks[1].eps: input should be less than or equal to 1, got 300" in str(error.value)


@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_they_run_in_a_recipe_beside_the_built_in_ones(tmp_path: Path) -> None:
    recipe = read(
        TINY,
        [
            "interpreters=[cam, {name: grey-patches, grid: 3}]",
            "defenses=[]",
            "attacks=[clean, {name: blinding, eps: 0.2, steps: 6, step_size: 0.1, knowledge: [oblivious, adaptive]}]",
            "metrics=[l1, peak-shift]",
            "evaluation.images=8",
        ],
    )
    assert run(recipe, tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    arrays = folder.arrays("grey-patches", "blinding, oblivious")
    assert float(folder.arrays("grey-patches", "clean")["peak-shift"].max()) == 0
    assert float(arrays["peak-shift"].max()) > 0
    assert float(arrays["success"].mean()) > 0
    system = System.load(folder.system("grey-patches"))
    assert isinstance(system.interpreter, Occlusion)
    assert system.interpreter.grid == 3
    html = (tmp_path / "run" / "report.html").read_text()
    assert "blinding, adaptive" in html
    assert "How far the map&#39;s largest value moved" in html


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(InputError, match="attack 'blinding' is registered already"):
        ATTACKS.register("blinding")(type("Other", (), {}))
