"""Columns of an attack's entry: a list of radii or of steps is a column each."""

from __future__ import annotations

import math
from typing import Any

import pytest

from robustexplain.errors import InputError
from robustexplain.evaluation.sweeps import sweeps
from robustexplain.recipe.columns import columns_of
from robustexplain.recipe.spelled import spelled
from robustexplain.schema import numbers


def columns(**entry: Any) -> Any:
    return columns_of(numbers(entry), "attacks[0]", ["cam"])


def test_a_list_of_radii_is_a_column_each_with_the_radius_in_its_label() -> None:
    found = columns(name="adv2", eps=["1/255", "2/255", 0.2], steps=4, knowledge=["oblivious", "adaptive"])
    labels = [f"adv2, eps {eps}, {word}" for word in ("oblivious", "adaptive") for eps in ("1/255", "2/255", "0.2")]
    assert [c.label for c in found] == labels
    assert [c.attack.eps for c in found] == [1 / 255, 2 / 255, 0.2] * 2
    assert [c.facts.settings for c in found[:3]] == [f"eps {eps}, 4 steps" for eps in ("1/255", "2/255", "0.2")]
    assert [(s.setting, s.title, s.values) for s in sweeps(found)] == [
        ("eps", f"adv2, {word} (steps 4)", [1 / 255, 2 / 255, 0.2]) for word in ("oblivious", "adaptive")
    ]


def test_radii_and_steps_may_both_be_lists_and_other_settings_keep_columns_apart() -> None:
    both = columns(name="pgd", eps=[0.1, 0.2], steps=[5, 50])
    assert [c.label for c in both] == [f"pgd, eps {e}, steps {s}" for e in (0.1, 0.2) for s in (5, 50)]
    assert sorted((s.setting, tuple(s.values)) for s in sweeps(both)) == [
        *[("eps", (0.1, 0.2))] * 2,
        *[("steps", (5.0, 50.0))] * 2,
    ]
    apart = [*columns(name="pgd", eps=0.1, label="a"), *columns(name="pgd", eps=0.2, restarts=2, label="b")]
    assert sweeps(apart) == []
    assert len(sweeps([*columns(name="pgd", eps=0.1, label="a"), *columns(name="pgd", eps=0.2, label="b")])) == 1


@pytest.mark.parametrize(
    ("eps", "said"),
    [
        ([], "a number, or a list of different numbers"),
        ([0.1, 0.1], "a list of different numbers, is needed, got \\[0.1, 0.1\\]"),
        ([0.1, "much"], "is needed, got \\[0.1, 'much'\\]"),
        ([0.1, 2.0], r"attacks\[0\].eps"),
        ([0.1, math.nan], r"is needed, got \[0.1, nan\]"),
        ([math.inf, 0.1], r"is needed, got \[inf, 0.1\]"),
    ],
)
def test_other_lists_are_refused(eps: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        columns(name="adv2", eps=eps)


@pytest.mark.parametrize("key", ["knowledge", "source"])
def test_a_list_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf"attacks\[0\].{key}: the list is empty"):
        columns(name="adv2", **{key: []})


def test_numbers_are_spelled_as_people_write_them() -> None:
    assert [spelled(v) for v in (8 / 255, 0.125, 0.2, 50, 1 / 3, 1000)] == [
        "8/255",
        "0.125",
        "0.2",
        "50",
        "0.3333",
        "1000",
    ]
