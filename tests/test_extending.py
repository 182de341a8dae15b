"""A user's own components, as docs/extending.md writes them: a short file each, listed, named in recipes and run."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustexplain as rx
from robustexplain import registry
from robustexplain.commands.list import markdown, rows_of
from robustexplain.data import Data
from robustexplain.defenses import InputTransform
from robustexplain.errors import InputError
from robustexplain.evaluation import RunFolder, run
from robustexplain.fields import Count
from robustexplain.interpreters import Explanation, GradCAM, Interpreter
from robustexplain.models import Classifier
from robustexplain.recipe import check, read
from robustexplain.registry import ATTACKS, INTERPRETERS, TRANSFORMS, Registry
from robustexplain.system import System
from robustexplain.training import Training
from robustexplain.transforms import Transform, transform

TINY = Path(__file__).parent / "tiny.yaml"
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, flags=re.M | re.S))
"""The files of the page by the names of their modules; ``go`` runs the recipe."""
REGISTRIES = [value for value in vars(registry).values() if isinstance(value, Registry)]


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


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The page's modules, and what they register, for the length of a test."""
    for each in REGISTRIES:
        list(each)  # what comes with the package is there first
        monkeypatch.setattr(each, "_entries", dict(each._entries))
    made = {}
    for name in FILES.keys() - {"go"}:
        made[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made[name])
        exec(compile(FILES[name], f"{name}.py", "exec"), made[name].__dict__)
    INTERPRETERS.register("grey-patches", paper="The user 2026", needs=("courage",))(Occlusion)
    return made


def test_each_takes_fewer_than_forty_lines() -> None:
    assert len(FILES) == 6
    assert all(len(text.splitlines()) < 40 for text in FILES.values())
    assert len(inspect.getsource(Occlusion).splitlines()) < 40


@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_the_page_runs_its_recipe_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)
    quick = text.replace("size: 16", "size: 16, fractions: [0.15, 0.1, 0.75]").replace(
        "images: 8", "images: 4, bootstrap: 50, pictures: 1"
    )
    (tmp_path / "mine.yaml").write_text(quick)
    monkeypatch.chdir(tmp_path)
    said: dict[str, int] = {}
    exec(compile(FILES["go"], "go.py", "exec"), said)
    assert said["failed"] == 0
    folder = RunFolder(tmp_path / "runs" / "mine")
    watched = System.load(folder.system("unsure (gamma)"))
    assert watched.defenses == ("noise-training", "input-transform", "unsure")
    assert type(watched.detector).__name__ == "UnsureDetector"
    assert [t.name for t in watched.model.transforms] == ["gamma-1.5"]
    arrays = folder.arrays("unsure (gamma)", "blinding, adaptive")
    assert {"alarm", "score", "peak-shift"} <= set(arrays)


def test_the_hardening_draws_no_global_numbers_and_repeats(
    modules: dict[str, ModuleType], trained: Classifier, digits: Data
) -> None:
    defense = modules["my_hardening"].NoiseTraining(training=Training(epochs=1, batch_size=64))
    few = torch.utils.data.Subset(digits.train, range(64))
    before = torch.get_rng_state()
    first = defense.hardened(trained, few)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = defense.hardened(trained, few)
    for a, b, old in zip(first.parameters(), again.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, old)


def test_the_transform_stands_in_front_and_passes_a_gradient(trained: Classifier) -> None:
    system = InputTransform(["gamma-2"])(rx.System(trained, GradCAM(trained)))
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(system.model(x), trained(x.clamp_min(1e-4) ** 2))
    assert torch.autograd.grad(system.model(x).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    "kind,name,summary,needs,settings",
    [
        ("attacks", "blinding", "Misclassify, and empty the map.", "gradients, differentiable maps", "steps=20"),
        ("defenses", "unsure", "Add a detector of inputs", "data", "false_alarms=0.05"),
        ("detectors", "unsure", "One minus the largest probability", "", ""),
        ("interpreters", "grey-patches", "How much the class's logit falls", "courage", "grid=4"),
        ("metrics", "peak-shift", "How far the map's largest value moved", "", ""),
    ],
)
def test_it_is_listed_like_the_built_in_ones(kind: str, name: str, summary: str, needs: str, settings: str) -> None:
    row = next(row for row in rows_of(kind) if row[0] == name)
    assert row[1].startswith(summary)
    assert row[2] == "The user 2026"
    assert row[3] == needs
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


class Careless(Transform):
    """The image itself; takes no number."""

    def __init__(self) -> None:
        super().__init__("careless")

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_transform_without_numbers_goes_by_its_name() -> None:
    with pytest.raises(InputError, match=r"unknown transform 'careless'; expected one of bit-depth-BITS"):
        transform("careless")
    TRANSFORMS.register("careless")(Careless)
    assert isinstance(transform("careless"), Careless)
    for name in ("careless-2", "jpeg"):
        with pytest.raises(InputError, match=rf"unknown transform '{name}'; expected one of .*careless"):
            transform(name)


@pytest.mark.parametrize(
    "module,cls,method,gives,said",
    [
        ("my_attack", "Blinding", "plan", None, "Blinding.plan must give a Plan, such as a Search, got None"),
        ("my_detector", "Unsure", "_fit", None, "Unsure._fit must give a Detector, got NoneType"),
        ("my_detector", "Unsure", "_defend", None, "Unsure must give a System, got NoneType"),
        (
            "my_detector",
            "UnsureDetector",
            "score",
            torch.zeros(1, 3),
            r"score must give a number a sample, \[20\], got",
        ),
        ("my_hardening", "NoiseTraining", "_harden", None, "NoiseTraining._harden must give a model, got NoneType"),
        ("my_metric", "PeakShift", "_measure", torch.tensor(1.0), r"must give a number a sample, \[2\], got \[\]"),
    ],
)
def test_what_does_not_give_what_it_must_is_named(
    module: str, cls: str, method: str, gives: Any, said: str,
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tiny_model: Classifier, grey: Tensor,
) -> None:  # fmt: skip
    monkeypatch.setattr(getattr(modules[module], cls), method, lambda *_: gives)
    system, few = rx.System(tiny_model, GradCAM(tiny_model)), [(grey[i % 5] * (1 - i / 40), 0) for i in range(20)]
    uses: dict[str, Callable[[], object]] = {
        "my_attack": lambda: modules["my_attack"].Blinding()(system, grey, torch.zeros(5, dtype=torch.int64)),
        "my_detector": lambda: modules["my_detector"].Unsure()(system, few),
        "my_hardening": lambda: modules["my_hardening"].NoiseTraining()(system, few),
        "my_metric": lambda: modules["my_metric"].PeakShift()(grey[:2, 0], grey[:2, 0]),
    }
    with pytest.raises(InputError, match=said):
        uses[module]()


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(InputError, match="attack 'blinding' is registered already"):
        ATTACKS.register("blinding")(type("Other", (), {}))


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        (torch.zeros(1, 16, 16), r"maps of Strange must have shape \[B, h, w\] for x of shape .*, got \[1, 16, 16\]"),
        (torch.zeros(5, 1, 16, 16), r"got \[5, 1, 16, 16\]"),
    ],
)
def test_maps_of_another_shape_are_named(maps: Tensor, said: str, tiny_model: Classifier, grey: Tensor) -> None:
    class Strange(Interpreter):
        """Maps that are none of the batch."""

        def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
            return Explanation(self.model(x), maps)

    with pytest.raises(InputError, match=said):
        Strange(tiny_model)(grey)
