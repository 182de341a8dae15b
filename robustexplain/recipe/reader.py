"""A recipe is one YAML file that holds one whole experiment: data, never code.

A model or a data set may be in a Python file of the user's own, which the recipe names and only the user can let run.

Every entry is checked against the typed fields of the class that it names, before anything is trained; a mistake is an
error that names its path in the file (``attacks[2].eps``), the value and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..defenses.detection import DetectorDefense
from ..errors import InputError, MissingDataError
from ..own_code import sha256_of
from ..random_streams import derive
from ..registry import METRICS
from ..renamed import SECTIONS, renamed
from ..schema import make, numbers
from ..transforms import HarmlessChange
from . import entries
from .auditing import Auditing
from .columns import columns_of
from .experiment import Evaluation, Recipe, Row, Sanity
from .overrides import changed
from .problems import Problems
from .rows import Rows
from .scanners import scanning_of
from .yaml_file import load


def read(path: str | Path, changes: Sequence[str] = (), *, trust_code: bool = False) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of one that comes with the package (``quickstart``).
        changes: ``key.path=value`` strings that go over the file (``attacks[1].eps=4/255``); values are YAML.
        trust_code: whether code of the user's own that the recipe names may run.

    Raises:
        InputError: with the path in the file, the value and what is allowed; every problem that was found. Code of
            the user's own that is not trusted.
        MissingDataError: no such file.
    """
    file = find(path)
    try:
        tree = load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not YAML: {error}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    for change in changes:
        tree = changed(tree, change)
    if isinstance(tree, dict) and "name" not in tree and _NAME.fullmatch(file.stem):
        # So that two files without a name do not share a run directory.
        tree = {"name": file.stem, **tree}
    try:
        recipe = check(_with_code(tree, file.parent))
    except InputError as error:
        lines = str(error).replace("\n", "\n  ")
        raise type(error)(f"{file}:\n  {lines}") from None
    if trust_code:
        return recipe.trusting()
    if recipe.code:
        what = " and ".join(f"{code.file} ({code.name})" for code in recipe.code)
        raise InputError(f"{file} would run the code of {what}; if you trust it, say so: --trust-code")
    return recipe


def _with_code(tree: Any, folder: Path) -> Any:
    """The tree with what identifies code of the user's own: whole paths, and the files' SHA-256."""
    if not isinstance(tree, dict):
        return tree
    found = dict(tree)
    for key in ("model", "data"):
        entry = tree.get(key)
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            beside = folder / Path(entry["file"]).expanduser()
            file = (beside if beside.is_file() else Path(entry["file"]).expanduser()).resolve()
            found[key] = {**entry, "file": str(file), "sha256": entry.get("sha256") or sha256_of(file)}
    return found


def find(path: str | Path) -> Path:
    """The file of that path, or of the packaged recipe of that name."""
    file = Path(path)
    if file.is_file():
        return file
    from .. import recipes

    packaged = recipes.path(str(path).removesuffix(".yaml").removeprefix("recipes/"))
    if packaged.is_file():
        return packaged
    raise MissingDataError(f"no recipe at {path}; the packaged ones are: {', '.join(recipes.names())}")


_NAME = re.compile(r"\w[\w .-]*")
_TOP = {
    *("name", "about", "seed", "seeds", "repeat", "data", "model", "interpreters", "manipulations", "defenses"),
    *("attacks", "metrics", "evaluation", "sanity", "scan", "audit"),
}


def check(tree: Any) -> Recipe:
    """A recipe from plain data; see :func:`read`."""
    if not isinstance(tree, dict):
        raise InputError(f"a recipe is a YAML mapping, got {type(tree).__name__}")
    tree = numbers(tree)
    problems = Problems()
    problems.run(lambda: _keys(tree))
    seed = tree.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        problems.add(f"seed: a whole number of at least 0 is needed, got {seed!r}")
    seeds = problems.run(lambda: _whole(tree.get("seeds", 1), "seeds", 1))
    repeat = problems.run(lambda: _whole(tree.get("repeat", 0), "repeat", 0))
    if (seeds or 1) > 1 and repeat:
        problems.add(
            f"seeds: {seeds} trainings are those of repeat 0 to {seeds - 1}, and repeat: {repeat} names one of them; "
            "leave out either"
        )
    data = problems.run(lambda: entries.data_set(tree.get("data")))
    model = problems.run(lambda: entries.model(tree.get("model")))
    evaluation = problems.run(lambda: make(Evaluation, tree.get("evaluation") or {}, "evaluation"))
    sanity = problems.run(lambda: make(Sanity, tree.get("sanity") or {}, "sanity"))
    scan = problems.run(lambda: scanning_of(tree.get("scan"), "scan"))
    audit = problems.run(lambda: Auditing.from_entry(tree.get("audit"), "audit"))
    reader = Rows(problems)
    reader.read("interpreter", _listed(tree, "interpreters"), "interpreters")
    reader.read("manipulation", _listed(tree, "manipulations"), "manipulations")
    reader.read("defense", _listed(tree, "defenses"), "defenses")
    rows = [row.label for row in reader.made]
    columns = problems.each(_listed(tree, "attacks"), lambda e, p: columns_of(e, p, list(reader.known)), "attacks")
    metrics = problems.each(_listed(tree, "metrics", ["l1", "l2", "iou"]), entries.metric, "metrics")
    if not rows and not problems.lines:
        problems.add("interpreters: at least one is needed")
    flat = [column for group in columns for column in group]
    if not flat and not problems.lines:
        problems.add("attacks: at least one is needed")
    for label in _twice(rows):
        problems.add(
            f"interpreters, manipulations and defenses: two are called {label!r}; give one of them another label"
        )
    for label in _twice([column.label for column in flat]):
        problems.add(f"attacks: two are called {label!r}; give one of them another label")
    for metric in _twice([name for name, _ in metrics]):
        problems.add(f"metrics: {metric} stands there twice")
    name = problems.run(lambda: _name(tree.get("name", "experiment")))
    problems.stop()
    measured = dict(metrics)
    if "iou" not in measured:
        measured["iou"] = METRICS.get("iou").build()
    about = str(tree.get("about", "")).strip()
    return Recipe(
        name=name, about=about, seed=seed, data=data, model=model, columns=tuple(flat),
        rows=tuple(_repeated(_calibrated_on(row, evaluation.harmless), repeat) for row in reader.made),
        metrics=measured, evaluation=evaluation, sanity=sanity, scan=scan, audit=audit, source=tree, seeds=seeds,
        repeat=repeat,
    )  # fmt: skip


def _whole(value: Any, key: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1000:
        raise InputError(f"{key}: a whole number from {least} to 1000 is needed, got {value!r}")
    return value


def _repeated(row: Row, repeat: int) -> Row:
    """The row as it is made for that time: a defense or manipulation under another seed."""
    known = getattr(row.settings, "seed", None)
    if not repeat or not isinstance(known, int):
        return row
    return replace(row, settings=replace(row.settings, seed=derive(known, "repeat", repeat) % 2**32))


def _calibrated_on(row: Row, harmless: tuple[HarmlessChange, ...]) -> Row:
    """The row, its detector calibrated on the recipe's harmless changes where its own entry names none."""
    settings = row.settings
    if not harmless or not isinstance(settings, DetectorDefense) or settings.harmless != ():
        return row
    return replace(row, settings=replace(settings, harmless=harmless))


def _name(value: Any) -> str:
    """The name of a recipe, which is that of the run's folder too."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    name = entries.short_text(str(value) if number else value, "name")
    if not _NAME.fullmatch(name):
        raise InputError(f"name: letters, digits, spaces, dots and dashes are allowed, got {name!r}")
    return name


def _twice(labels: Sequence[str]) -> list[str]:
    return sorted({label for label in labels if labels.count(label) > 1})


def _keys(tree: dict[str, Any]) -> None:
    lines = []
    for key in sorted(set(map(str, tree)) - _TOP):
        near = difflib.get_close_matches(key, _TOP, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(_TOP))}"
        lines.append(f"{key}: unknown key" + (renamed(key, SECTIONS) or hint))
    lines += [f"{key}: this key is needed" for key in ("data", "model", "interpreters", "attacks") if key not in tree]
    if lines:
        raise InputError("\n".join(lines))


def _listed(tree: dict[str, Any], key: str, default: list[str] | None = None) -> Any:
    value = tree.get(key)
    return (default or []) if value is None else value
