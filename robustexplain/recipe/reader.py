"""A recipe is one YAML file that holds one whole experiment: data, never code.

Every entry is checked against the typed fields of the class that it names, before anything is trained; a mistake is an
error that names its path in the file (``attacks[2].eps``), the value and what is allowed.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from .. import data as data_sets
from ..errors import InputError, MissingDataError
from ..metrics import Metric
from ..registry import ATTACKS, DATASETS, DEFENSES, INTERPRETERS, MANIPULATIONS, METRICS, MODELS, Registry
from ..renamed import KNOWLEDGE, SECTIONS, renamed
from .experiment import Column, Evaluation, GoalMap, Knowledge, Model, Recipe, Row, Sanity
from .overrides import changed
from .problems import Problems
from .schema import make, model_of, needs_parts, numbers, settings_of, validate


def read(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of one that comes with the package (``quickstart``).
        changes: ``key.path=value`` strings that go over the file (``attacks[1].eps=4/255``); values are YAML.

    Raises:
        InputError: with the path in the file, the value and what is allowed; every problem that was found.
        MissingDataError: no such file.
    """
    file = find(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {error}") from None
    for change in changes:
        tree = changed(tree, change)
    try:
        return check(tree)
    except InputError as error:
        lines = str(error).replace("\n", "\n  ")
        raise InputError(f"{file}:\n  {lines}") from None


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


_TOP = {
    *("name", "about", "seed", "data", "model", "interpreters", "manipulations", "defenses"),
    *("attacks", "metrics", "evaluation", "sanity"),
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
    data = problems.run(lambda: _component(DATASETS, tree.get("data"), "data"))
    model = problems.run(lambda: _model(tree.get("model")))
    evaluation = problems.run(lambda: make(Evaluation, tree.get("evaluation") or {}, "evaluation"))
    sanity = problems.run(lambda: make(Sanity, tree.get("sanity") or {}, "sanity"))
    bases = problems.each(_listed(tree, "interpreters"), _interpreter, "interpreters")
    known = _labels(_listed(tree, "interpreters"))
    lied = problems.each(
        _listed(tree, "manipulations"), lambda e, p: _derived("manipulation", e, p, known), "manipulations"
    )
    known |= {row.label: row for row in lied}
    defended = problems.each(_listed(tree, "defenses"), lambda e, p: _derived("defense", e, p, known), "defenses")
    rows = [row.label for row in bases + lied + defended]
    columns = problems.each(_listed(tree, "attacks"), lambda e, p: _column(e, p, rows), "attacks")
    metrics = problems.each(_listed(tree, "metrics", ["l1", "l2", "iou"]), _metric, "metrics")
    if not bases and not problems.lines:
        problems.add("interpreters: at least one is needed")
    flat = [column for group in columns for column in group]
    if not flat and not problems.lines:
        problems.add("attacks: at least one is needed")
    for words, labels in (("interpreters, manipulations and defenses", rows),
                          ("attacks", [c.label for c in flat])):  # fmt: skip
        for label in sorted({x for x in labels if labels.count(x) > 1}):
            problems.add(f"{words}: two are called {label!r}; give one of them another label")
    names = [name for name, _ in metrics]
    for name in sorted({x for x in names if names.count(x) > 1}):
        problems.add(f"metrics: {name} stands there twice")
    name = str(tree.get("name", "experiment"))
    if not re.fullmatch(r"\w[\w .-]*", name):
        # It is the name of the run's folder.
        problems.add(f"name: letters, digits, spaces, dots and dashes are allowed, got {name!r}")
    problems.stop()
    measured = dict(metrics)
    if "iou" not in measured:
        measured["iou"] = METRICS.get("iou").build()
    about = str(tree.get("about", "")).strip()
    return Recipe(
        name=name, about=about, seed=seed, data=data, model=model, rows=tuple(bases + lied + defended),
        columns=tuple(flat), metrics=measured, evaluation=evaluation, sanity=sanity, source=tree,
    )  # fmt: skip


def check_data(recipe: Recipe) -> data_sets.Data:
    """Load the data set and hold it against the recipe: what is missing is found before anything is trained.

    Raises:
        MissingDataError: files that are not there.
        InputError: a part that is needed and empty; every problem that was found.
    """
    problems = Problems()
    weights = recipe.model.weights
    if weights is not None and not Path(weights).expanduser().is_file():
        problems.missing.append(f"model.weights: no file at {weights}")
    loaded: data_sets.Data | None = problems.run(recipe.data.load, "data")
    if loaded is not None:
        for line in _unfit(recipe, loaded):
            problems.add(line)
        problems.run(lambda: recipe.named(loaded.features))
    problems.stop()
    assert loaded is not None  # a problem otherwise; for the type checker
    return loaded


def _unfit(recipe: Recipe, loaded: data_sets.Data) -> list[str]:
    size = {part: len(getattr(loaded, part)) for part in data_sets.PARTS}
    lines = []
    if not size["test"]:
        lines.append(f"data: the test part of {loaded.name} is empty; see data.fractions")
    bases = [row for row in recipe.rows if not row.derived]
    if len(loaded.shape) == 1:
        lines += [
            f"attacks: {column.label!r} moves the pixels of images, and {loaded.name} is a table; on tables only "
            "`clean` stands beside manipulations"
            for column in recipe.columns
            if "tables" not in column.attack.takes
        ]
    if not size["train"] + size["defense"]:
        lines += [
            f"attacks: {column.label!r} needs images of the adversary's own, and the defense and train parts of "
            f"{loaded.name} are empty; see data.fractions"
            for column in recipe.columns
            if column.attack.needs_data or column.goal_map == "random-class"
        ]
    trained = ["model.train"] if recipe.model.train else []
    trained += [f"interpreters[{i}]" for i, row in enumerate(bases) if INTERPRETERS.get(row.name).train is not None]
    if trained and not size["train"]:
        where = ", ".join(trained)
        lines.append(f"{where}: trains, and the train part of {loaded.name} is empty; see data.fractions")
    for i, row in enumerate(row for row in recipe.rows if row.kind == "defense"):
        if row.settings.needs_data and not size["defense"]:
            lines.append(
                f"defenses[{i}]: {row.label!r} trains, and the defense part of {loaded.name} is empty; "
                "see data.fractions"
            )
    if not size["train"] + size["defense"]:
        lines += [
            f"manipulations: {row.label!r} needs samples of the adversary's own, and the defense and train parts of "
            f"{loaded.name} are empty; see data.fractions"
            for row in recipe.rows
            if row.kind == "manipulation" and row.settings.needs_data
        ]
    return lines


def _keys(tree: dict[str, Any]) -> None:
    import difflib

    lines = []
    for key in sorted(set(map(str, tree)) - _TOP):
        near = difflib.get_close_matches(key, _TOP, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(_TOP)}"
        lines.append(f"{key}: unknown key" + (renamed(key, SECTIONS) or hint))
    lines += [f"{key}: this key is needed" for key in ("data", "model", "interpreters", "attacks") if key not in tree]
    if lines:
        raise InputError("\n".join(lines))


def _listed(tree: dict[str, Any], key: str, default: list[str] | None = None) -> Any:
    value = tree.get(key)
    return (default or []) if value is None else value


def _split(
    registry: Registry, entry: Any, path: str, extra: Sequence[str] = ()
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The registry's entry that an entry names, its own settings, and the keys in ``extra`` that it also holds."""
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError(f"{path}: a name, or a mapping with a name, is needed, got {entry!r}")
    try:
        found = registry.get(entry["name"])
    except InputError as error:
        raise InputError(f"{path}.name: {error}") from None
    own = {key: value for key, value in entry.items() if key != "name" and key not in extra}
    return found, own, {key: entry[key] for key in extra if key in entry}


def _component(registry: Registry, entry: Any, path: str) -> Any:
    if entry is None:
        raise InputError(f"{path}: this key is needed")
    if isinstance(entry, str) and ":" in entry:
        prefix, _, rest = entry.partition(":")
        entry = {"name": prefix, "path": rest}
    elif isinstance(entry, dict) and ":" in str(entry.get("name", "")):
        prefix, _, rest = entry["name"].partition(":")
        entry = {**entry, "name": prefix, "path": rest}
    found, own, _ = _split(registry, entry, path)
    return make(found.build, own, path)


def _model(entry: Any) -> Model:
    if entry is None:
        raise InputError("model: this key is needed")
    made: Model = make(Model, {"name": entry} if isinstance(entry, str) else entry, "model")
    try:
        build = MODELS.get(made.name.partition(":")[0]).build
    except InputError as error:
        raise InputError(f"model.name: {error}") from None
    known = inspect.signature(build).parameters
    for name in made.options:
        if name not in known:
            raise InputError(f"model.options.{name}: {made.name} has no such option; it has {', '.join(known)}")
    return made


def _labels(entries: Any) -> dict[str, Row]:
    """Rows of a recipe's interpreters by label, without their settings; those with mistakes in them too."""
    listed = entries if isinstance(entries, list) else []
    named = [e if isinstance(e, dict) else {"name": e} for e in listed]
    labels = [(str(e.get("label", e.get("name"))), str(e.get("name"))) for e in named]
    return {label: Row(label, label, name, None, label) for label, name in labels}


def _interpreter(entry: Any, path: str) -> Row:
    found, own, extra = _split(INTERPRETERS, entry, path, ("label",))
    if found.train is None and needs_parts(found.build):
        raise InputError(f"{path}.name: {found.name!r} is made of other parts, by a defense; it is no row of its own")
    settings = make(found.settings, own, path) if found.settings else settings_of(found.build, own, path)
    label = str(extra.get("label", found.name))
    return Row(label, label, found.name, settings, label)


def _derived(kind: Literal["manipulation", "defense"], entry: Any, path: str, bases: dict[str, Row]) -> Row:
    """A row that stands on another one: ``of`` says on which."""
    found, own, extra = _split(MANIPULATIONS if kind == "manipulation" else DEFENSES, entry, path, ("label", "of"))
    made = make(found.build, own, path)
    done = "manipulated" if kind == "manipulation" else "defended"
    if "of" not in extra:
        raise InputError(f"{path}.of: this key is needed: the interpreter that is {done}, one of {', '.join(bases)}")
    base = bases.get(extra["of"])
    if base is None:
        raise InputError(
            f"{path}.of: no interpreter of the recipe is called {extra['of']!r}; it has {', '.join(bases)}"
        )
    able = made.attacks if kind == "manipulation" else made.defends
    name = bases[base.root].name if base.root in bases else base.name
    if able and name not in able:
        verb = "is aimed at" if kind == "manipulation" else "can defend"
        raise InputError(f"{path}.of: {found.name} {verb} {', '.join(able)}; {extra['of']!r} is {name}")
    label = str(extra.get("label", f"{found.name} ({extra['of']})"))
    return Row(label, base.label, found.name, made, base.root, kind)


@dataclass(frozen=True)
class ColumnSettings:
    """What the entry of an attack says beside the attack's own settings."""

    knowledge: Knowledge | list[Knowledge] = "oblivious"
    goal_map: GoalMap = "benign"
    source: str | list[str] | None = None
    label: str | None = None


def _column(entry: Any, path: str, rows: list[str]) -> list[Column]:
    found, own, extra = _split(ATTACKS, entry, path, ("knowledge", "goal_map", "source", "label"))
    attack = make(found.build, own, path)
    known_by = extra.get("knowledge")
    for word in known_by if isinstance(known_by, list) else [known_by]:
        if said := renamed(word, KNOWLEDGE):
            raise InputError(f"{path}.knowledge: unknown word {word!r}{said}")
    play = validate(model_of(ColumnSettings), extra, path)
    levels = play.knowledge if isinstance(play.knowledge, list) else [play.knowledge]
    sources = play.source if isinstance(play.source, list) else [play.source]
    for source in sources:
        if source is not None and source not in rows:
            raise InputError(f"{path}.source: no row of the recipe is called {source!r}; it has {', '.join(rows)}")
    if play.goal_map != "benign" and not attack.needs_maps:
        raise InputError(f"{path}.goal_map: {found.name} does not look at maps, so it has no goal map")
    goal = "" if play.goal_map == "benign" else f", {play.goal_map}"
    named = isinstance(play.knowledge, list) or "knowledge" in extra
    columns = []
    for level, source in itertools.product(levels, sources):
        crafted = "" if source is None else f", from {source}"
        label = (play.label or found.name) + goal + (f", {level}" if named else "") + crafted
        columns.append(Column(label, attack, level, play.goal_map, source))
    return columns


def _metric(entry: Any, path: str) -> tuple[str, Any]:
    found, own, _ = _split(METRICS, entry, path)
    if getattr(found.build, "of_cell", Metric.of_cell) is Metric.of_cell:
        raise InputError(f"{path}: {found.name} needs more than a cell has (see its documentation); use it in Python")
    return found.name, make(found.build, own, path)
