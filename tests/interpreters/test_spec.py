"""An interpreter by name and settings, as data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from robustexplain import models
from robustexplain.defenses import AggregatedInterpreter
from robustexplain.errors import InputError
from robustexplain.interpreters import GradCAM, Gradient, InterpreterSpec, SmoothGrad
from robustexplain.storage import load_component, save_component
from robustexplain.system import System


@pytest.mark.parametrize(
    "given", [{"name": "smoothgrad", "samples": 7}, InterpreterSpec("smoothgrad", (("samples", 7),))]
)
def test_it_is_made_of_data_and_makes_the_interpreter(given: Any) -> None:
    spec = InterpreterSpec.of(given)
    model = models.load("small-cnn")
    made = spec.build(model)
    assert isinstance(made, SmoothGrad)
    assert (made.samples, made.model is model) == (7, True)
    assert spec == InterpreterSpec("smoothgrad", {"samples": 7})
    assert hash(spec) == hash(InterpreterSpec("smoothgrad", {"samples": 7}))
    assert str(spec) == "smoothgrad(samples=7)"


def test_a_name_and_a_class_are_the_same_spec() -> None:
    assert InterpreterSpec.of(GradCAM) == InterpreterSpec.of("gradcam") == InterpreterSpec("gradcam")


@pytest.mark.parametrize(
    "given,expected",
    [
        ({"name": "smoothgrad", "sample": 7}, "smoothgrad.sample: unknown key; did you mean 'samples'?"),
        ({"name": "smoothgrad", "samples": 0}, "smoothgrad.samples: input should be greater than or equal to 1, got 0"),
        ({"name": "gradcam", "layer": {"a": 1}}, "a setting of an interpreter is a number, a word or a list of them"),
        ("gradcm", "unknown interpreter 'gradcm'; did you mean 'gradcam'"),
        (3, "an interpreter's name or class, or a mapping with a name, is needed, got 3"),
    ],
)
def test_what_it_cannot_be_is_refused(given: Any, expected: str) -> None:
    with pytest.raises(InputError) as error:
        InterpreterSpec.of(given)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("name,why", [("rts", "is trained"), ("aggregate", "is made of other parts")])
def test_what_a_model_alone_does_not_make_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' {why}"):
        InterpreterSpec(name).build(models.load("small-cnn"))


def test_it_is_stored_and_read_again(tmp_path: Path) -> None:
    spec = InterpreterSpec("gradcam", {"layer": "net.features.3"})
    save_component(spec, tmp_path)
    assert load_component(tmp_path) == spec


def test_members_with_settings_are_made_with_them_and_the_systems_own_is_kept() -> None:
    model = models.load("small-cnn")
    own = Gradient(model, of="probability") if "probability" in _words() else Gradient(model)
    made = AggregatedInterpreter(["gradient", {"name": "smoothgrad", "samples": 3}])(System(model, own))  # type: ignore[list-item]
    first, second = made.interpreter.members  # type: ignore[attr-defined]
    assert first is own
    assert second.samples == 3
    other = AggregatedInterpreter([InterpreterSpec("gradient", {"channels": "sum"}), GradCAM])(System(model, own))
    assert other.interpreter.members[0].channels == "sum"  # type: ignore[attr-defined]


def _words() -> str:
    return str(next(f.type for f in dataclasses.fields(Gradient) if f.name == "of"))
