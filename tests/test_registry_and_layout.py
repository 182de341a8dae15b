"""Names, entry points, what an import costs, who may import whom, and that everything public says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import robustexplain
from robustexplain import registry
from robustexplain.errors import InputError, UnknownNameError
from robustexplain.registry import ALL, ATTACKS, Registry

HERE = Path(robustexplain.__file__).parent
KINDS = list(ALL)

# Registries


class Point:
    """An entry point of somebody's package."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value

    def load(self) -> object:
        return self.value


def thing() -> str:
    """A thing. Found by name."""
    return "thing"


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown interpreter 'grad-cam'; did you mean 'gradcam'") as caught:
        registry.INTERPRETERS.get("grad-cam")
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UnknownNameError, match=r"unknown metric 'zzzz'; known: aopc, aopc-lerf"):
        registry.METRICS.get("zzzz")


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_known_documented_and_gives_its_class_back(kind: str) -> None:
    entries = list(ALL[kind])
    assert entries
    assert [e.name for e in entries] == sorted(e.name for e in entries)
    for entry in entries:
        assert entry.name in ALL[kind]
        assert ALL[kind].get(entry.name) is entry
        assert ALL[kind].get(ALL[kind].name_of(entry.build)).build is entry.build
        assert entry.summary.endswith((".", ":", ")")) or len(entry.summary) > 20, entry.name
        assert entry.name == entry.name.lower()


def test_a_name_is_given_once() -> None:
    things = Registry("thing", ())
    things.register("a")(thing)
    things.register("a")(thing)  # the same again, as when a module is reloaded, is no conflict
    with pytest.raises(InputError, match="thing 'a' is registered already, by <function thing"):
        things.register("a")(lambda: None)
    assert things.get("a").build is thing
    with pytest.raises(InputError, match=r"<lambda> is not a registered thing; decorate it first"):
        things.name_of(lambda: None)


def test_an_entry_keeps_what_it_was_registered_with() -> None:
    things = Registry("thing", ())
    things.register("a", paper="Someone 2020, eq. 1", needs=("gradients",))(thing)
    entry = things.get("a")
    assert (entry.paper, entry.needs, entry.summary) == (
        "Someone 2020, eq. 1",
        ("gradients",),
        "A thing. Found by name.",
    )


def test_entry_points_of_other_packages_are_found_but_do_not_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def points(group: str) -> list[Point]:
        asked.append(group)
        return [Point("theirs", thing), Point("ours", lambda: "impostor")]

    monkeypatch.setattr(registry, "entry_points", points)
    things = Registry("thing", ())
    things.register("ours")(thing)
    assert asked == []
    assert things.get("theirs").build is thing
    assert things.get("ours").build is thing
    assert asked == ["robustexplain.things"]


def test_an_entry_point_keeps_what_the_decorator_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading an entry point imports its module, whose decorator has registered the class by then, with its paper."""
    things = Registry("thing", ())

    class Decorated(Point):
        def load(self) -> object:
            return things.register("theirs", paper="Someone 2020", needs=("data",))(thing)

    monkeypatch.setattr(registry, "entry_points", lambda group: [Decorated("theirs", thing)])
    assert (things.get("theirs").paper, things.get("theirs").needs) == ("Someone 2020", ("data",))


def test_an_entry_point_makes_an_interpreter_that_everything_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustexplain.interpreters import Gradient

    class Theirs(Gradient):
        """Somebody's own."""

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point("theirs", Theirs)] if "interp" in group else [])
    fresh = Registry("interpreter", registry.INTERPRETERS.homes)
    assert fresh.get("theirs").build is Theirs


# Imports


def run(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip()


def test_importing_robustexplain_stays_light() -> None:
    heavy = "('matplotlib', 'captum', 'sklearn', 'timm', 'torchvision', 'torch', 'skops', 'accelerate')"
    assert run(f"import sys, robustexplain; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_importing_the_parts_loads_no_plots_and_no_explainers() -> None:
    parts = "attacks, data, defenses, interpreters, metrics, models, objectives, System"
    heavy = "('matplotlib', 'captum', 'sklearn', 'timm', 'skops')"
    code = f"import sys; from robustexplain import {parts}; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_every_public_name_can_be_had_from_the_package() -> None:
    for name in robustexplain.__all__:
        assert getattr(robustexplain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atacks'"):
        _ = robustexplain.atacks


# Rooms from the ground up: a module imports from its own room and from rooms below, and modules never in a circle.
ROOMS: tuple[str, ...] = (
    *(
        "_version",
        "renamed",
        "errors",
        "fields",
        "parts",
        "checks",
        "hidden",
        "single_image",
        "door",
        "files",
        "seals",
        "random_streams",
        "registry",
        "features",
        "own_code",
        "fingerprint",
        "schema",
        "maps",
        "rounding",
        "progress",
        "answers",
    ),
    *("autograd", "transforms", "data", "training", "models", "interpreters", "system", "metrics", "objectives"),
    *("storage", "attacks", "defenses", "plots", "pages", "recipes", "recipe", "evaluation", "sanity"),
    *("commands", "cli", "__main__"),
)
LEVEL = {room: level for level, room in enumerate(ROOMS)}
OPEN = {("system", "storage")}
"""A system saves itself by a call into the room above it, imported when it is needed."""


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name behind ``robustexplain.``; a package by its own."""
    roots = {"": HERE}
    roots |= {room: Path(importlib.import_module(f"robustexplain.{room}").__path__[0]) for room in OUTSIDE}
    found: dict[str, Path] = {}
    for prefix, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            parts = [*filter(None, [prefix]), *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


OUTSIDE = ("attacks", "defenses", "recipes")
MODULES = [m for m in sources() if m != "__init__"]


def imports(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """``(dotted name behind robustexplain., line)`` of each import of ours, inside functions too."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            start = ".".join([*(["robustexplain", *base] if node.level else []), *filter(None, [node.module])])
            # A name may be a module of that package, or something that the package's own module gives.
            full = [f"{start}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("robustexplain.") in MODULES else start for name in full]
        else:
            continue
        if id(node) in typing_only:
            continue
        for name in names:
            if name.startswith("robustexplain."):
                yield name.removeprefix("robustexplain."), node.lineno


def violations(module: str, text: str, is_package: bool = False) -> list[str]:
    own = module.split(".")[0]
    found = []
    for name, line in imports(ast.parse(text), module, is_package):
        other = name.split(".")[0]
        if LEVEL[other] > LEVEL[own] and (own, other) not in OPEN:
            found.append(f"{module}:{line} imports {name}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches the others by imports."""
    reached = {start: _reach(graph, start) for start in graph}
    groups = {tuple(sorted(m for m in reached[start] if start in reached[m])) for start in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, left = set[str](), list(graph[start])
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            left += graph.get(module, ())
    return seen


def test_every_module_has_a_place_in_the_order_of_rooms() -> None:
    assert {m.split(".")[0] for m in MODULES} == set(LEVEL)
    assert {"attacks.base", "defenses.detection.x_ensemble", "interpreters.base", "storage", "attacks"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards_only(module: str) -> None:
    path = sources()[module]
    assert not violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        m: {n for n, _ in imports(ast.parse(p.read_text(encoding="utf-8")), m, p.name == "__init__.py")} - {m}
        for m, p in sources().items()
        if m != "__init__"
    }
    graph["system"] -= {"storage"}
    assert not circles(graph)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_nothing_is_taken_from_typing_that_python_3_10_does_not_have() -> None:
    later = {"LiteralString", "Never", "NotRequired", "Required", "Self", "TypeVarTuple", "Unpack", "assert_never"}
    later |= {"assert_type", "dataclass_transform", "override", "reveal_type"}
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "typing":
                assert not later & {name.name for name in node.names}, f"{module}: take it from typing_extensions"


def test_the_package_itself_imports_nothing_of_its_own_at_run_time() -> None:
    tree = ast.parse((HERE / "__init__.py").read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    assert [name for name, _ in imports(tree, "__init__")] == ["_version"]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("interpreters.base", "from ..attacks import PGD"),
        ("interpreters.base", "def f():\n    from robustexplain.attacks.search.loop import Search"),
        ("interpreters.base", "from .. import attacks"),
        ("interpreters.base", "import robustexplain.defenses"),
        ("attacks.search.loop", "from robustexplain import defenses"),
        ("defenses.detection.x", "from ...cli import main"),
        ("maps", "from .interpreters import Gradient"),
        ("autograd.layers", "if True:\n    from ..models import build"),
    ],
)
def test_the_check_sees_an_import_that_goes_up(module: str, text: str) -> None:
    assert len(violations(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("interpreters.base", "from .. import checks, maps"),
        ("attacks.search.loop", "from ..threat import Linf\nfrom robustexplain.system import System"),
        ("defenses.detection.x", "from ..base import Defense\nfrom ...attacks import PGD"),
        ("cli", "from .recipe import read\nimport torch"),
    ],
)
def test_the_check_lets_imports_that_go_down_pass(module: str, text: str) -> None:
    assert not violations(module, text)


# Docstrings


def packages() -> list[ModuleType]:
    found = [robustexplain]
    for info in pkgutil.walk_packages([str(HERE)], "robustexplain."):
        if info.ispkg and info.name.split(".")[1] not in ("tests", "build", "docs"):
            found.append(importlib.import_module(info.name))
    for name in ("attacks", "defenses", "defenses.detection"):
        found.append(importlib.import_module(f"robustexplain.{name}"))
    return found


def undocumented(cls: type[Any]) -> list[str]:
    """Public methods and properties of a class of ours without a docstring of their own or of a base."""
    found = []
    for name, member in inspect.getmembers(cls):
        owner = next((c for c in cls.__mro__ if name in vars(c)), object)
        ours = owner.__module__.startswith("robustexplain")
        callable_ = callable(member) or isinstance(member, property)
        if ours and callable_ and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            found.append(f"{cls.__qualname__}.{name}")
    return found


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.__name__)
def test_every_public_name_has_a_docstring(package: ModuleType) -> None:
    assert package.__doc__
    missing = []
    for name in getattr(package, "__all__", ()):
        value = getattr(package, name)
        if inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value):
            missing += [] if inspect.getdoc(value) else [f"{package.__name__}.{name}"]
        missing += undocumented(value) if inspect.isclass(value) else []
    assert not missing


@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_component_and_its_methods_have_docstrings(kind: str) -> None:
    missing = []
    for entry in ALL[kind]:
        doc = entry.build.__doc__ or ""
        # A dataclass without a docstring gets its signature for one.
        missing += [entry.name] if not doc or doc.startswith(f"{entry.build.__name__}(") else []
        missing += undocumented(entry.build) if inspect.isclass(entry.build) else []
    assert not missing


def test_attacks_that_are_compositions_are_short() -> None:
    """At most 45 lines beside the docstring; ADV2 is the one attack with a page of options."""
    for entry in ATTACKS:
        before, _, rest = inspect.getsource(entry.build).split('"""', 2)
        source = before + rest
        if "Search(" in source and entry.name not in ("adv2", "adaptive-squeezing", "substitute"):
            assert len([line for line in source.splitlines() if line.strip()]) <= 45, entry.name
