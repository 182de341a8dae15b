"""Rows that stand on each other: each system is made once, and an adversary meets the one that it is said to meet."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustexplain import data as data_sets
from robustexplain.attacks import ADV2, PGD, Clean, DeepFool, FeatureDeletion
from robustexplain.attacks.adaptive import Adaptation
from robustexplain.defenses import AggregatedInterpreter, BetaSmoothing, Defense, FeatureSqueezing
from robustexplain.errors import InputError
from robustexplain.evaluation import RunFolder, prepared, run
from robustexplain.evaluation.adversaries import Adversaries, oblivious_view
from robustexplain.evaluation.judged import choose
from robustexplain.evaluation.notes import notes
from robustexplain.evaluation.origins import Origins
from robustexplain.evaluation.prepared import Builder, prepare
from robustexplain.evaluation.results import Results
from robustexplain.interpreters import RTS, GradCAM, Gradient
from robustexplain.models import build
from robustexplain.progress import Advance
from robustexplain.recipe import check
from robustexplain.recipe.experiment import Column, Evaluation, Recipe, Row
from robustexplain.registry import DEFENSES
from robustexplain.sanity.run import run_sanity
from robustexplain.system import System
from robustexplain.training import Session

TREE: dict[str, Any] = {
    "name": "stacked",
    "data": {"name": "digits", "size": 16, "fractions": [0.4, 0.1, 0.5]},
    "model": {"name": "small-cnn"},
    "interpreters": ["gradient", "gradcam", {"name": "rts", "levels": 2, "width": 4, "training": {"epochs": 1}}],
    "attacks": ["clean"],
    "evaluation": {"images": 8, "batch_size": 4, "bootstrap": 20, "pictures": 1, "only_correct": False},
}


@dataclass(frozen=True)
class Shifting(Defense):
    """Hardens nothing: moves the classifier's weights, and counts how often."""

    by: float = 0.1

    needs_data: ClassVar[bool] = True
    part: ClassVar[str] = "train"
    layer = "model"
    trained: ClassVar[list[int]] = []

    def hardened(self, model: nn.Module, data: Any, session: Session | None = None) -> nn.Module:
        self.trained.append(len(data))
        made = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(self.by)
        return made

    def _defend(self, system: System, data: Any, session: Session) -> System:
        raise AssertionError("the matrix hardens the model, not the system")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    DEFENSES._load()
    before = dict(DEFENSES._entries)
    DEFENSES.register("shifting")(Shifting)
    yield
    DEFENSES._entries.clear()
    DEFENSES._entries.update(before)


@pytest.fixture(autouse=True)
def counted() -> list[int]:
    Shifting.trained.clear()
    return Shifting.trained


@pytest.fixture(scope="module")
def loaded() -> data_sets.Data:
    found: data_sets.Data = check(TREE).data.load()
    return found


def stacked(*rows: tuple[str, str, Any]) -> Recipe:
    """The recipe with further rows: label, label of the row below, defense."""
    recipe = check(TREE)
    for label, base, defense in rows:
        root = recipe.row(base).root
        row = Row(label, base, DEFENSES.name_of(type(defense)), defense, root, "defense")
        recipe = replace(recipe, rows=(*recipe.rows, row))
    return recipe


def built(recipe: Recipe, loaded: data_sets.Data, folder: Path) -> tuple[Builder, Adversaries]:
    builder = Builder(recipe, loaded, Session(folder=folder / "training"))
    return builder, Adversaries(recipe, prepare(builder, RunFolder(folder)), Origins(recipe))


# ---- each system once ----


def test_a_hardened_model_is_trained_once_on_its_part_for_all_rows_that_ask_for_it(
    loaded: data_sets.Data, tmp_path: Path, counted: list[int]
) -> None:
    rows = [(f"shifted {base}", base, Shifting()) for base in ("gradient", "gradcam", "rts")]
    more = ("otherwise", "gradient", Shifting(by=0.2))
    recipe = stacked(*rows, ("twice", "shifted gradcam", Shifting()), more)
    _, adversaries = built(recipe, loaded, tmp_path)
    systems = adversaries.prepared.by_row
    assert set(systems) == {row.label for row in recipe.rows}, adversaries.prepared.failures
    assert counted == [len(loaded.train)] * 3  # type: ignore[arg-type]  # the shared one, the one on top of it, the other
    shared = systems["shifted gradient"].model
    assert shared is systems["shifted gradcam"].model
    assert shared is systems["shifted rts"].model
    assert len({id(systems[label].model) for label in ("gradient", "shifted gradcam", "twice", "otherwise")}) == 4
    assert isinstance(systems["twice"].interpreter, GradCAM)


def test_a_trained_interpreter_is_trained_anew_on_the_hardened_model(loaded: data_sets.Data, tmp_path: Path) -> None:
    recipe = stacked(("shifted", "rts", Shifting(by=0.01)))
    _, adversaries = built(recipe, loaded, tmp_path)
    plain, shifted = (adversaries.prepared.by_row[label].interpreter for label in ("rts", "shifted"))
    assert isinstance(plain, RTS)
    assert isinstance(shifted, RTS)
    assert not torch.equal(next(plain.masker.parameters()), next(shifted.masker.parameters()))
    checkpoints = {path.parent for path in (tmp_path / "training").rglob("rts.safetensors")}
    assert len(checkpoints) == 2
    labels = {path.read_text() for path in (tmp_path / "training").rglob("label.txt")}
    assert labels == {"rts", "shifted"}


def test_a_model_cannot_be_hardened_below_another_defense_and_the_row_above_says_whose_fault_it_is(
    loaded: data_sets.Data, tmp_path: Path
) -> None:
    smooth = ("smooth", "gradient", BetaSmoothing())
    recipe = stacked(smooth, ("late", "smooth", Shifting()), ("above", "late", BetaSmoothing()))
    _, adversaries = built(recipe, loaded, tmp_path)
    failures = adversaries.prepared.failures
    assert set(failures) == {"late", "above"}
    assert "stands on smooth, where beta-smoothing was applied already" in failures["late"]
    assert "late could not be made" in failures["above"]


# ---- whom an adversary meets ----


@pytest.fixture(scope="module")
def many(loaded: data_sets.Data, tmp_path_factory: pytest.TempPathFactory) -> Adversaries:
    squeeze = {"samples": 24, "squeezers": ("bit-depth-2",)}
    recipe = stacked(
        ("squeezed", "gradient", FeatureSqueezing(**squeeze)),
        ("squeezed-2", "gradient", FeatureSqueezing(**{**squeeze, "squeezers": ("median-2",)})),
        ("aggregated", "gradcam", AggregatedInterpreter()),
        ("shifted", "gradcam", Shifting()),
        ("shifted aggregated", "shifted", AggregatedInterpreter()),
        ("shifted squeezed", "shifted aggregated", FeatureSqueezing(**squeeze)),
        ("smooth", "gradient", BetaSmoothing()),
        ("smoother", "smooth", FeatureSqueezing(**squeeze)),
    )
    adversaries = built(recipe, loaded, tmp_path_factory.mktemp("many"))[1]
    assert not adversaries.prepared.failures
    return adversaries


def jobs(adversaries: Adversaries, column: Column, *labels: str) -> list[str]:
    return [adversaries.job(adversaries.experiment.row(label), column).name for label in labels]


def test_two_detectors_do_not_share_one_adaptive_attack(many: Adversaries) -> None:
    for attack in (PGD(steps=2), PGD(steps=2, adapt=Adaptation(evade=1.0)), DeepFool(), ADV2(steps=2)):
        names = jobs(many, Column("knows", attack, "adaptive"), "gradient", "squeezed", "squeezed-2")
        assert len(set(names)) == 3, attack
    one, other = (
        many.job(many.experiment.row(label), Column("knows", PGD(steps=2), "adaptive")).system.detector
        for label in ("squeezed", "squeezed-2")
    )
    assert one is not None
    assert one is not other


def test_who_does_not_know_of_the_detector_shares_the_attack_on_the_classifier(many: Adversaries) -> None:
    everywhere = ("gradient", "gradcam", "rts", "squeezed", "squeezed-2", "aggregated", "smooth", "smoother")
    assert len(set(jobs(many, Column("plain", PGD(steps=2)), *everywhere))) == 1
    on_hardened = ("shifted", "shifted aggregated", "shifted squeezed")
    assert len(set(jobs(many, Column("plain", PGD(steps=2)), *on_hardened, "gradcam"))) == 2


def test_an_oblivious_attacker_of_maps_sees_the_undefended_interpreter_on_the_deployed_model(many: Adversaries) -> None:
    column = Column("plain", ADV2(steps=2))
    same = jobs(many, column, "gradient", "squeezed", "squeezed-2", "smooth", "smoother")
    assert len(set(same)) == 1
    hardened = jobs(many, column, "shifted", "shifted aggregated", "shifted squeezed")
    assert len(set(hardened)) == 1
    assert hardened[0] not in jobs(many, column, "gradcam", "aggregated")
    seen, _ = many.oblivious(many.experiment.row("shifted squeezed"))
    assert type(seen.interpreter) is GradCAM
    assert seen.model is many.prepared.by_row["shifted"].model
    assert seen.detector is None


def test_the_view_of_a_hardened_aggregate_is_the_root_s_own_interpreter_or_the_defense_s_say() -> None:
    model, hardened = build("small-cnn", num_classes=3), build("small-cnn", num_classes=3, seed=1)
    root = AggregatedInterpreter(("gradient", "gradcam"))(System(model, Gradient(model)))
    defended = System(hardened, Gradient(hardened))
    view = oblivious_view(BetaSmoothing(), defended, root)
    assert view.interpreter.members[1].model is hardened  # type: ignore[attr-defined]

    class Own:
        def oblivious_view(self, defended: System, root: System) -> System:
            return root

    assert oblivious_view(Own(), defended, root) is root


def test_a_column_that_adapts_to_nothing_says_so(loaded: data_sets.Data) -> None:
    recipe = replace(
        stacked(("smooth", "gradient", BetaSmoothing())),
        columns=(
            Column("blind", FeatureDeletion(), "adaptive"),
            Column("pgd", PGD(), "adaptive"),
            Column("clean", Clean()),
        ),
    )
    said = notes(Results(recipe, {}, {}, {}, {}))
    assert [line.partition(":")[0] for line in said] == ["blind"]
    assert "nothing to adapt" in said[0]


# ---- what is judged ----


def test_without_an_image_that_is_classified_right_nothing_is_trained_or_attacked(
    tmp_path: Path, loaded: data_sets.Data
) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.full((len(x),), 10), 11).float()

    recipe = check(TREE)
    settings = replace(recipe.evaluation, only_correct=True)
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"nothing to judge: none of the \d+ inputs of the test part of digits"):
        choose([Wrong()], loaded, settings, 0, cpu)
    assert len(choose([Wrong()], loaded, recipe.evaluation, 0, cpu).judged) == 8


def test_rows_are_calibrated_on_the_classes_that_they_are_judged_on(loaded: data_sets.Data) -> None:
    """Also where there are few of one class, which the judged inputs alone would use up."""
    labels = torch.tensor(data_sets.labels_of(loaded.test))
    few, many = (labels == 0).nonzero()[:6, 0].tolist(), (labels == 1).nonzero()[:, 0].tolist()
    rare = replace(loaded, test=data_sets.subset(loaded.test, [*few, *many]))
    settings = Evaluation(images=30, calibration=20, only_correct=False)
    judged, beyond = choose([], rare, settings, 0, torch.device("cpu"))
    assert (len(judged), len(beyond), len({*judged, *beyond})) == (30, 20, 50)
    assert (sum(p < 6 for p in judged), sum(p < 6 for p in beyond)) == (4, 2)
    # Otherwise they are the first and the next ones, whatever the number of the next ones.
    order = data_sets.take(loaded.test, len(loaded.test), 0).indices
    assert choose([], loaded, settings, 0, torch.device("cpu")) == (order[:30], order[30:50])
    assert len(choose([], rare, replace(settings, images=60), 0, torch.device("cpu")).judged) == 60


@dataclass
class Listed:
    """A progress display that remembers its tasks."""

    tasks: list[tuple[str, int, int]]

    def task(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        @contextmanager
        def shown() -> Iterator[Advance]:
            steps: list[int] = []
            yield lambda step, /, *, note="": steps.append(step)
            self.tasks.append((name, total, done + sum(steps)))

        return shown()

    def say(self, text: str) -> None:
        """Nobody listens."""


def test_bars_name_their_row_end_full_and_are_not_empty(tmp_path: Path) -> None:
    listed = Listed([])
    tree = {**TREE, "interpreters": [TREE["interpreters"][2]], "sanity": {"images": 2, "stages": 2}}
    assert run(check(tree), tmp_path / "run", Session(progress=listed)) == 0
    assert run_sanity(check(tree), tmp_path / "run", Session(progress=listed)) == 0
    assert ("rts: rts", 11, 11) in listed.tasks
    assert ("rts: shift", 1, 1) in listed.tasks
    assert not [name for name, total, done in listed.tasks if not total or total != done]


# ---- sanity checks ----


def test_defenses_of_the_interpreter_are_checked_and_detectors_are_not(tmp_path: Path) -> None:
    defenses = [
        {"name": "aggregated", "of": "gradcam", "members": ["gradient", "gradcam"]},
        {"name": "feature-squeezing", "of": "gradcam", "samples": 20, "squeezers": ["bit-depth-2"]},
        {"name": "shifting", "of": "gradcam", "by": 0.01},
    ]
    tree = {**TREE, "interpreters": ["gradcam"], "defenses": defenses,
            "sanity": {"images": 4, "stages": 2, "pictures": 1}}  # fmt: skip
    assert run_sanity(check(tree), tmp_path / "run", Session(), ["cascading"]) == 0
    lines = (tmp_path / "run/sanity.csv").read_text().splitlines()[1:]
    assert {line.partition(",")[0] for line in lines} == {"gradcam", "aggregated (gradcam)", "shifting (gradcam)"}
    assert "aggregated (gradcam)" in (tmp_path / "run/sanity.html").read_text()


def test_what_one_process_alone_may_meet_stops_all_of_them_and_bad_input_does_not() -> None:
    """The others would wait for ever in the training that one of them left."""

    class Two:
        num_processes = 2

    class Shared:
        accelerator = Two()

    with pytest.raises(OSError, match="full"):
        prepared._stop_all(Shared(), OSError("disk full"))  # type: ignore[arg-type]
    prepared._stop_all(Shared(), InputError("the same everywhere"))  # type: ignore[arg-type]
    prepared._stop_all(Session(), OSError("alone"))
