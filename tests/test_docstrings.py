"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import robustexplain
from robustexplain import attacks, defenses

ROOMS = {
    "robustexplain": Path(robustexplain.__file__).parent,
    "robustexplain.attacks": Path(attacks.__file__).parent,
    "robustexplain.defenses": Path(defenses.__file__).parent,
}
FACES = ("System", "ADV2", "AggregatedInterpreter", "GradCAM", "TopK", "Linf", "load", "Misclassify", "RTS")


def modules_with_examples() -> list[str]:
    """Read off the files, so that collecting imports nothing."""
    found = set()
    for room, root in ROOMS.items():
        for path in root.rglob("*.py"):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(root).with_suffix("").parts
                found.add(".".join([room, *(part for part in parts if part != "__init__")]))
    return sorted(found)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(importlib.import_module(name)):
        runner.run(test, out=said.append)
    assert runner.tries > 0, f"{name} has >>> where no docstring is"
    assert not runner.failures, "".join(said)


def test_the_public_face_has_examples() -> None:
    found = [
        test.name.rsplit(".", 1)[-1]
        for name in modules_with_examples()
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        if test.examples
    ]
    assert set(FACES) <= set(found)
    assert found.count("load") >= 2, "models.load and data.load"
