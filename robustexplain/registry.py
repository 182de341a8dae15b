"""One registry a kind of component: names, papers and needs, read off the classes themselves.

Registering is one decorator on the class. A third party's package adds its own through an entry point in the group
``robustexplain.<kind>s`` whose name is the component's name and whose value is the class.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import InputError, UnknownNameError

C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A registered component: its name, class (or builder), paper and needs."""

    name: str
    build: Callable[..., Any]
    paper: str = ""
    needs: tuple[str, ...] = ()
    settings: type | None = None
    train: Callable[..., Any] | None = None

    @property
    def summary(self) -> str:
        """The first line of the component's docstring."""
        return (self.build.__doc__ or "").strip().split("\n")[0]


@dataclass
class Registry:
    """Components of one kind by name.

    Args:
        kind: the singular, as users write it: ``"attack"``.
        homes: the packages that register the built-in ones when imported.
    """

    kind: str
    homes: tuple[str, ...]
    _entries: dict[str, Entry] = field(default_factory=dict)
    _loaded: bool = False

    def register(
        self,
        name: str,
        *,
        paper: str = "",
        needs: tuple[str, ...] = (),
        settings: type | None = None,
        train: Callable[..., Any] | None = None,
    ) -> Callable[[C], C]:
        """Give a class (or a builder function) a name.

        Args:
            name: as recipes write it.
            paper: authors, year, equation.
            needs: words such as ``"gradients"`` or ``"detector"``.
            settings: for a component that is trained: the dataclass whose fields recipes write, and ...
            train: ... the function that makes the component from them.
        """

        def decorate(build: C) -> C:
            if name in self._entries and self._entries[name].build is not build:
                raise InputError(f"{self.kind} {name!r} is registered already, by {self._entries[name].build!r}")
            self._entries[name] = Entry(name, build, paper, needs, settings, train)
            return build

        return decorate

    def get(self, name: str) -> Entry:
        """The entry of that name; ``UnknownNameError`` (a ``ValueError``) with the nearest names if there is none."""
        self._load()
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def name_of(self, build: Callable[..., Any]) -> str:
        """The name under which a class was registered."""
        self._load()
        for entry in self._entries.values():
            if entry.build is build:
                return entry.name
        raise InputError(f"{getattr(build, '__name__', build)!s} is not a registered {self.kind}; decorate it first")

    def __iter__(self) -> Iterator[Entry]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda e: e.name))

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._entries

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for home in self.homes:
            importlib.import_module(home)
        for point in entry_points(group=f"robustexplain.{self.kind}s"):
            build = point.load()
            # The decorator on the class has said more than the entry point does.
            if point.name not in self._entries:
                self.register(point.name)(build)


MODELS = Registry("model", ("robustexplain.models",))
DATASETS = Registry("dataset", ("robustexplain.data",))
INTERPRETERS = Registry("interpreter", ("robustexplain.interpreters", "robustexplain.defenses"))
OBJECTIVES = Registry("objective", ("robustexplain.objectives",))
METRICS = Registry("metric", ("robustexplain.metrics",))
ATTACKS = Registry("attack", ("robustexplain.attacks",))
MANIPULATIONS = Registry("manipulation", ("robustexplain.attacks.manipulation",))
"""Attacks on systems themselves: System to System, as defenses are."""
DEFENSES = Registry("defense", ("robustexplain.defenses",))
PARTS = Registry(
    "part",
    (
        *("robustexplain.system", "robustexplain.autograd.rectifiers", "robustexplain.transforms"),
        *("robustexplain.models", "robustexplain.interpreters", "robustexplain.defenses"),
        "robustexplain.attacks.manipulation",
    ),
)
"""Pieces of systems that are stored with them and that users do not name: settings, networks of interpreters."""
TRANSFORMS = Registry("transform", ("robustexplain.transforms",))
"""Transforms of images; their numbers follow the name: ``jpeg-75``."""
HARMLESS = Registry("harmless-change", ("robustexplain.transforms",))
"""Changes of inputs that no adversary makes, on which rows and detectors are calibrated."""
DETECTORS = Registry("detector", ("robustexplain.defenses.detection",))
SCANNERS = Registry("scanner", ("robustexplain.defenses.manipulated",))
"""What judges a model that its owner may have manipulated."""

ALL: dict[str, Registry] = {
    f"{r.kind}s": r
    for r in (
        *(MODELS, DATASETS, INTERPRETERS, OBJECTIVES, METRICS, ATTACKS, MANIPULATIONS, DEFENSES, DETECTORS, SCANNERS),
        *(TRANSFORMS, HARMLESS),
    )
}
