"""Rows stand on earlier rows: an interpreter, a manipulated system, a defended one; one or several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from robustexplain.defenses import AggregatedInterpreter, Defense
from robustexplain.errors import InputError
from robustexplain.interpreters import InterpreterSpec
from robustexplain.recipe import check
from robustexplain.recipe.experiment import Recipe
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session
from robustexplain.transforms import Rounding, Shift

TINY = Path(__file__).parents[1] / "tiny.yaml"


def recipe(**sections: Any) -> Recipe:
    tree = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    return check({**tree, "interpreters": ["gradient", "gradcam", "rts"], "defenses": [], **sections})


def refusal(**sections: Any) -> str:
    with pytest.raises(InputError) as error:
        recipe(**sections)
    return str(error.value)


def labels(made: Recipe, kind: str = "defense") -> list[tuple[str, str, str]]:
    return [(row.label, row.base, row.root) for row in made.rows if row.kind == kind]


@dataclass(frozen=True)
class Inert(Defense):
    """Changes nothing."""

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        return system


class Hardens(Inert):
    layer: ClassVar[str] = "model"


class Wraps(Inert):
    layer: ClassVar[str] = "interpreter"


class Watches(Inert):
    layer: ClassVar[str] = "detector"


class Brings(Inert):
    layer: ClassVar[str] = "model"
    brings_interpreter: ClassVar[bool] = True


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defense of each layer, by name, and one that brings its interpreter."""
    monkeypatch.setattr(DEFENSES, "_entries", dict(DEFENSES._entries))
    for name, cls in {"hardens": Hardens, "wraps": Wraps, "watches": Watches, "brings": Brings}.items():
        DEFENSES.register(name)(cls)


def test_a_defense_stands_on_a_defense() -> None:
    made = recipe(
        defenses=[
            {"name": "beta-smoothing", "of": "gradient"},
            {"name": "x-ensemble", "of": "beta-smoothing (gradient)", "label": "both"},
            {"name": "feature-squeezing", "of": "both"},
        ]
    )
    assert labels(made) == [
        ("beta-smoothing (gradient)", "gradient", "gradient"),
        ("both", "beta-smoothing (gradient)", "gradient"),
        ("feature-squeezing (both)", "both", "gradient"),
    ]


def test_of_several_rows_is_a_row_each() -> None:
    made = recipe(
        defenses=[
            {"name": "beta-smoothing", "of": ["gradient", "gradcam"]},
            {"name": "beta-smoothing", "of": ["gradient"], "label": "mild", "beta": 30},
        ]
    )
    assert labels(made) == [
        ("beta-smoothing (gradient)", "gradient", "gradient"),
        ("beta-smoothing (gradcam)", "gradcam", "gradcam"),
        ("mild (gradient)", "gradient", "gradient"),
    ]
    assert [row.settings.beta for row in made.rows[3:]][2] == 30


@pytest.mark.parametrize(
    "of", [{"a": 1}, ["gradient", ["gradcam"]], 3, None, True, [{"of": "gradient"}]], ids=lambda v: str(v)
)
def test_a_wrong_type_under_of_is_a_message(of: Any) -> None:
    said = refusal(defenses=[{"name": "beta-smoothing", "of": of}])
    assert said.startswith("defenses[0].of: the label of an earlier row, or a list of them, is needed, got ")
    assert "\n" not in said


def test_of_names_earlier_rows_only() -> None:
    later = [{"name": "x-ensemble", "of": "smooth"}, {"name": "beta-smoothing", "of": "gradient", "label": "smooth"}]
    assert refusal(defenses=later) == (
        "defenses[0].of: no earlier row of the recipe is called 'smooth'; there are gradient, gradcam, rts"
    )
    assert refusal(defenses=[{"name": "beta-smoothing", "of": []}]) == (
        "defenses[0].of: at least one row is needed, got []"
    )


def test_a_mistake_in_a_row_is_not_one_of_the_rows_upon_it() -> None:
    said = refusal(
        defenses=[
            {"name": "beta-smoothing", "of": "gradient", "beta": -1, "label": "smooth"},
            {"name": "x-ensemble", "of": "smooth", "label": "stack"},
        ],
        attacks=[{"name": "pgd", "source": "stack"}],
    )
    assert said.startswith("defenses[0].beta: ")
    assert "\n" not in said


def test_a_row_may_not_take_the_label_of_the_row_it_stands_on() -> None:
    said = refusal(defenses=[{"name": "beta-smoothing", "of": "gradient", "label": "gradient"}])
    assert said == "interpreters, manipulations and defenses: two are called 'gradient'; give one of them another label"


@pytest.mark.usefixtures("registered")
def test_defenses_stack_in_the_order_of_their_layers() -> None:
    ordered = [
        {"name": "hardens", "of": "gradient"},
        {"name": "wraps", "of": "hardens (gradient)"},
        {"name": "watches", "of": "wraps (hardens (gradient))"},
    ]
    assert len(labels(recipe(defenses=ordered))) == 3
    said = refusal(defenses=[{"name": "wraps", "of": "gradient"}, {"name": "hardens", "of": "wraps (gradient)"}])
    assert said == (
        "defenses[1].of: defenses stack in the order model, input, interpreter, detector; 'hardens' changes the model "
        "and 'wraps (gradient)' has 'wraps' already: apply hardens first"
    )


@pytest.mark.usefixtures("registered")
def test_what_a_defense_can_defend_is_looked_for_through_the_rows_below() -> None:
    aid = {"name": "aid", "of": "hardens (rts)"}
    assert len(labels(recipe(defenses=[{"name": "hardens", "of": "rts"}, aid]))) == 2
    said = refusal(defenses=[{"name": "wraps", "of": "rts"}, {**aid, "of": "wraps (rts)"}])
    assert said == "defenses[1].of: aid can defend rts; 'wraps (rts)' is wraps"
    assert "aid can defend rts; 'hardens (gradient)' is gradient" in refusal(
        defenses=[{"name": "hardens", "of": "gradient"}, {**aid, "of": "hardens (gradient)"}]
    )


@pytest.mark.usefixtures("registered")
def test_a_defense_that_brings_its_interpreter_needs_no_row_below() -> None:
    made = recipe(defenses=["brings", {"name": "watches", "of": "brings"}, {"name": "brings", "of": "gradient"}])
    assert labels(made) == [
        ("brings", "brings", "brings"),
        ("watches (brings)", "brings", "brings"),
        ("brings (gradient)", "gradient", "gradient"),
    ]
    assert refusal(defenses=["hardens"]).startswith("defenses[0].of: this key is needed: the row that is defended")


def test_members_may_have_settings_of_their_own() -> None:
    members = [{"name": "smoothgrad", "samples": 20}, "gradcam"]
    made = recipe(defenses=[{"name": "aggregated", "of": "gradient", "members": members}])
    wanted = (InterpreterSpec("smoothgrad", {"samples": 20}), InterpreterSpec("gradcam"))
    assert made.rows[-1].settings == AggregatedInterpreter(wanted)
    assert made.rows[-1].settings.members == wanted


@pytest.mark.parametrize(
    "member,expected",
    [
        ({"name": "smoothgrad", "sample": 2}, "defenses[0].members[1].sample: unknown key; did you mean 'samples'?"),
        ({"name": "smoothgrad", "samples": 0}, "defenses[0].members[1].samples: input should be greater than"),
        ("gradcm", "defenses[0].members[1]: unknown interpreter 'gradcm'; did you mean 'gradcam'"),
        ({"samples": 2}, "defenses[0].members[1]: an interpreter's name or class, or a mapping with a name"),
        (3, "defenses[0].members[1]: an interpreter's name or class, or a mapping with a name, is needed, got 3"),
    ],
)
def test_a_wrong_member_is_refused_with_its_path(member: Any, expected: str) -> None:
    said = refusal(defenses=[{"name": "aggregated", "of": "gradient", "members": ["gradient", member]}])
    assert said.startswith(expected)
    assert "\n" not in said


@pytest.mark.parametrize(
    "change,expected",
    [
        ({"name": "x" * 5000}, "name: at most 100 letters are allowed, got 5000: 'xxxxxxxxxxxxxxxxxxxx'..."),
        ({"name": ["a"]}, "name: a text is needed, got ['a']"),
        ({"attacks": [{"name": "pgd", "label": ["a"]}]}, "attacks[0].label: a text is needed, got ['a']"),
        ({"interpreters": [{"name": "cam", 1: 2}]}, "interpreters[0]: keys are words, got 1"),
        (
            {"model": {"name": "small-cnn", "train": {"lr": float("inf")}}},
            "model.train.lr: must be finite and below 2^63, got inf",
        ),
        (
            {"model": {"name": "small-cnn", "train": {"epochs": "1e30"}}},
            "model.train.epochs: must be finite and below 2^63, got 1e+30",
        ),
    ],
)
def test_other_values_that_no_run_survives_are_refused(change: dict[str, Any], expected: str) -> None:
    assert refusal(**change) == expected


def test_detectors_are_calibrated_on_the_recipes_harmless_changes_unless_their_entry_says_others() -> None:
    plain = {"name": "feature-squeezing", "of": "gradcam", "squeezers": ["median-2"]}
    own = [{**plain, "label": "clean", "harmless": None}, {**plain, "label": "own", "harmless": ["shift"]}]
    made = recipe(defenses=[{**plain, "label": "plain"}, *own], evaluation={"harmless": ["rounding"]})
    found = {label: made.row(label).settings.harmless for label in ("plain", "clean", "own")}
    assert found == {"plain": (Rounding(),), "clean": None, "own": (Shift(),)}
    assert recipe(defenses=[{**plain, "label": "plain"}]).row("plain").settings.harmless == ()
