"""The rows of a matrix: interpreters, manipulated systems, and stacked defenses of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ..defenses.base import LAYERS, Layer
from ..errors import InputError
from ..registry import DEFENSES, INTERPRETERS, MANIPULATIONS
from ..schema import make, needs_parts, settings_of
from .entries import short_text, split
from .experiment import Row
from .problems import Problems


class Rows:
    """Reads rows in their order; ``of`` names any earlier one.

    Args:
        problems: collects what is wrong.
    """

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.known: dict[str, Row] = {}
        """Rows by label, those with mistakes in their settings too, so that one mistake is one message."""
        self.made: list[Row] = []

    def read(self, kind: Literal["interpreter", "manipulation", "defense"], entries: Any, path: str) -> None:
        """Read the section of a kind."""
        step = self._interpreter if kind == "interpreter" else self._manipulation if kind == "manipulation" else (
            self._defense
        )  # fmt: skip
        for rows in self.problems.each(entries, step, path):
            self.made += rows

    def _interpreter(self, entry: Any, path: str) -> list[Row]:
        name = entry.get("name") if isinstance(entry, dict) else entry
        label = entry.get("label", name) if isinstance(entry, dict) else name
        if isinstance(label, str):
            self.known.setdefault(label, Row(label, label, str(name), None, label))
        found, own, extra = split(INTERPRETERS, entry, path, ("label",))
        if found.train is None and needs_parts(found.build):
            raise InputError(
                f"{path}.name: {found.name!r} is made of other parts, by a defense; it is no row of its own"
            )
        build: Any = found.build
        settings = make(found.settings, own, path) if found.settings else settings_of(build, own, path)
        label = extra.get("label", found.name)
        return [Row(label, label, found.name, settings, label)]

    def _manipulation(self, entry: Any, path: str) -> list[Row]:
        found, own, extra = split(MANIPULATIONS, entry, path, ("label", "of"))
        cls: Any = found.build
        return self._upon("manipulation", found.name, cls, own, extra, path)

    def _defense(self, entry: Any, path: str) -> list[Row]:
        found, own, extra = split(DEFENSES, entry, path, ("label", "of"))
        cls: Any = found.build
        if "of" not in extra and getattr(cls, "brings_interpreter", False):
            label = extra.get("label", found.name)
            self.known.setdefault(label, Row(label, label, found.name, None, label, "defense"))
            return [Row(label, label, found.name, make(cls, own, path), label, "defense")]
        return self._upon("defense", found.name, cls, own, extra, path)

    def _upon(
        self,
        kind: Literal["manipulation", "defense"],
        name: str,
        cls: Any,
        own: dict[str, Any],
        extra: dict[str, Any],
        path: str,
    ) -> list[Row]:
        """A row for each row that ``of`` names."""
        rows = []
        for of in self._named(kind, extra, path):
            base = self.known[of]
            suffix = f" ({of})" if "label" not in extra or isinstance(extra["of"], list) else ""
            label = short_text(f"{extra.get('label', name)}{suffix}", f"{path}.label")
            rows.append(Row(label, base.label, name, None, base.root, kind))
        if not rows:
            raise InputError(f"{path}.of: at least one row is needed, got []")
        for row in rows:
            self.known.setdefault(row.label, row)
        settings = make(cls, own, path)
        for row in rows:
            self._fits(kind, name, settings, self.known[row.base], path)
        return [Row(row.label, row.base, name, settings, row.root, kind) for row in rows]

    def _named(self, kind: str, extra: dict[str, Any], path: str) -> list[str]:
        """The labels that ``of`` names."""
        labels = ", ".join(self.known)
        if "of" not in extra:
            done = "manipulated" if kind == "manipulation" else "defended"
            raise InputError(f"{path}.of: this key is needed: the row that is {done}, one of {labels}")
        named = extra["of"] if isinstance(extra["of"], list) else [extra["of"]]
        for of in named:
            if not isinstance(of, str):
                raise InputError(f"{path}.of: the label of an earlier row, or a list of them, is needed, got {of!r}")
            if of not in self.known:
                raise InputError(f"{path}.of: no earlier row of the recipe is called {of!r}; there are {labels}")
        return named

    def _fits(self, kind: str, name: str, settings: Any, base: Row, path: str) -> None:
        able = settings.attacks if kind == "manipulation" else settings.defends
        interpreter = interpreter_of(base, self.known)
        if able and interpreter not in able:
            verb = "is aimed at" if kind == "manipulation" else "can defend"
            raise InputError(f"{path}.of: {name} {verb} {', '.join(able)}; {base.label!r} is {interpreter}")
        if kind == "manipulation":
            return
        for part in standing_on(base, self.known):
            layer = _layer_of(part)
            if layer is not None and LAYERS.index(layer) > LAYERS.index(settings.layer):
                raise InputError(
                    f"{path}.of: defenses stack in the order {', '.join(LAYERS)}; {name!r} changes the "
                    f"{settings.layer} and {base.label!r} has {part.name!r} already: apply {name} first"
                )


def _layer_of(row: Row) -> Layer | None:
    """The layer that a row's own defense changes; ``None`` for an interpreter or a manipulation."""
    cls: Any = DEFENSES.get(row.name).build if row.kind == "defense" else None
    layer: Layer | None = getattr(cls, "layer", None)
    return layer


def standing_on(row: Row, rows: Mapping[str, Row]) -> Iterator[Row]:
    """The row, its base, and so on down to the first."""
    yield row
    while row.derived:
        row = rows[row.base]
        yield row


def interpreter_of(row: Row, rows: Mapping[str, Row]) -> str:
    """The name of the interpreter that a row's system has: its root's, or the last defense's that replaced it."""
    for part in standing_on(row, rows):
        if part.kind == "defense":
            cls: Any = DEFENSES.get(part.name).build
            if _layer_of(part) == "interpreter" and not cls.defends:
                return part.name
    return rows[row.root].name
