"""What there is, as tables: read off the registered classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from ..errors import UnknownNameError
from ..registry import ALL, ATTACKS, MANIPULATIONS, Entry, Registry


def registry_of(kind: str) -> Registry:
    """The registry of a kind, singular or plural.

    Raises:
        UnknownNameError: with the nearest kinds.
    """
    known = {**ALL, **{registry.kind: registry for registry in ALL.values()}}
    if kind not in known:
        raise UnknownNameError("kind", kind, ALL)
    return known[kind]


def defaults_of(entry: Entry) -> str:
    """``name=default`` of what a recipe can set."""
    component: Any = entry.settings or entry.build
    if dataclasses.is_dataclass(component):
        pairs = [(f.name, _default(f)) for f in dataclasses.fields(component) if f.init and f.name != "model"]
    else:
        parameters = inspect.signature(component).parameters.values()
        pairs = [(p.name, "" if p.default is p.empty else _short(p.default)) for p in parameters]
    return ", ".join(f"{name}={value}" if value else name for name, value in pairs)


def rows_of(kind: str) -> list[tuple[str, str, str, str, str]]:
    """Name, summary, paper, needs and defaults of every component of a kind."""
    return [
        (entry.name, entry.summary, entry.paper, ", ".join(entry.needs), defaults_of(entry))
        for entry in registry_of(kind)
    ]


def print_table(kind: str) -> None:
    """Print the table of a kind; plain text where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=kind, show_lines=True)
    for title, ratio in (("name", 2), ("what it does", 5), ("paper", 4), ("needs", 2), ("settings", 5)):
        table.add_column(title, ratio=ratio, overflow="fold")
    for row in rows_of(kind):
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def markdown(kind: str) -> str:
    """Name, summary and paper of every component of a kind, as a Markdown table: what the README shows.

    Attacks also say what they are made of: threat model, objective and search, read off their plans; manipulations,
    what of a system they change.
    """
    if registry_of(kind) is ATTACKS:
        return _attacks()
    if registry_of(kind) is MANIPULATIONS:
        return _manipulations()
    lines = [f"| {registry_of(kind).kind} | what it does | paper |", "| --- | --- | --- |"]
    for name, summary, paper, _, _ in rows_of(kind):
        lines.append(f"| `{name}` | {_plain(summary)} | {paper or '-'} |")
    return "\n".join(lines)


def _attacks() -> str:
    lines = [
        "| attack | what it does | where it goes | what it wants | how it looks | needs | paper |",
        "| --- " * 7 + "|",
    ]
    for entry in ATTACKS:
        words = [word or "-" for word in entry.build().words()]
        cells = [_plain(entry.summary), *words, ", ".join(entry.needs) or "-", entry.paper or "-"]
        lines.append(f"| `{entry.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _manipulations() -> str:
    lines = ["| manipulation | what it does | what it changes | needs | paper |", "| --- " * 5 + "|"]
    for entry in MANIPULATIONS:
        changes: str = entry.build.changes  # type: ignore[attr-defined]
        cells = [_plain(entry.summary), changes, ", ".join(entry.needs) or "-", entry.paper or "-"]
        lines.append(f"| `{entry.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    # A bar inside a cell would end it.
    return text.replace("``", "`").replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _short(field.default)
    return _short(field.default_factory()) if field.default_factory is not dataclasses.MISSING else ""


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "{...}"
    return str(value)
