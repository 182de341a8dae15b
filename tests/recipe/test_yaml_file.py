"""A recipe's file may be hostile: it ends at once with one message, whatever it would become."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from robustexplain.errors import InputError
from robustexplain.recipe import check, read
from robustexplain.recipe.yaml_file import load

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE = {
    "aliases of aliases": (LAUGHS, "line 6: more than 100000 values, those that aliases repeat counted each time"),
    "merged aliases of aliases": (LAUGHS + "z: {<<: {k: *i}}", "line 6: more than 100000 values"),
    "an alias in itself": ("attacks: &a [*a]", r"line 1: \*a stands inside of &a itself"),
    "a mapping in itself": ("x: 1\nattacks: &a {name: *a}", r"line 2: \*a stands inside of &a itself"),
    "deep": ("a: " + "[" * 900 + "]" * 900, "line 1: lists and mappings stand in one another more than 40 deep"),
    "a long number": ("seed: " + "9" * 5000, r"line 1: a whole number must be below 2\^63"),
    "a long hexadecimal number": ("seed: 0x" + "f" * 5000, r"line 1: a whole number must be below 2\^63"),
    "a long number to base 60": ("seed: " + ":".join(["59"] * 3000), r"line 1: a whole number must be below 2\^63"),
    "no date": ("about: 2001-13-45", "is not YAML: month must be"),
    "a tag": ("a: !!timestamp x", "is not YAML of plain data: line 1 has the tag"),
    "a key twice": ("attacks: [a]\nname: x\nattacks: [b]", "line 3: the key 'attacks' stands there already, on line 1"),
    "a key twice, below": ("a:\n- {b: 1, 'b': 2}", "line 2: the key 'b' stands there already, on line 2"),
    "long": ("#" * 1_000_001, "longer than 1000000 characters"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_ends_at_once_with_one_message(case: str, tmp_path: Path) -> None:
    text, expected = HOSTILE[case]
    file = tmp_path / "r.yaml"
    file.write_text(text)
    start = time.perf_counter()
    with pytest.raises(InputError, match=expected) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ")
    assert time.perf_counter() - start < 2


def test_aliases_and_merges_of_ordinary_size_are_read() -> None:
    text = "one: &one {eps: 0.1, steps: 3}\ntwo: {<<: *one, steps: 5}\nthree: [*one, *one]"
    one = {"eps": 0.1, "steps": 3}
    assert load(text) == {"one": one, "two": {"eps": 0.1, "steps": 5}, "three": [one, one]}


def test_plain_data_that_hold_themselves_are_refused_too() -> None:
    attacks: list[object] = []
    attacks.append(attacks)
    with pytest.raises(InputError, match="more than 40 deep"):
        check({"attacks": attacks})


def test_a_change_of_the_command_line_is_read_as_carefully() -> None:
    with pytest.raises(InputError, match=r"--set seed=&a \[\*a\]: the value line 1: \*a stands inside"):
        read("quickstart", ["seed=&a [*a]"])
