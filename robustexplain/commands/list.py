"""``robustexplain list``: all registered components, as tables from their classes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from .. import recipes
from ..errors import InputError, UnknownNameError
from ..registry import ALL, ATTACKS, MANIPULATIONS, MODELS, TRANSFORMS, Entry, Registry

KINDS = [*ALL, "recipes"]
COLUMNS = (("name", 2), ("what it does", 5), ("paper", 4), ("needs", 2), ("settings", 5))
RECIPE_COLUMNS = (("recipe", 3), ("what it shows", 6), ("what it needs", 5), ("how long it takes", 3))


def list_kind(
    kind: Annotated[str, typer.Argument(help=f"{', '.join(KINDS)}; or all.", autocompletion=lambda: [*KINDS, "all"])],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table; all: as a page.")] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="models: measure which interpreter explains which family (minutes), as a page."),
    ] = False,
) -> None:
    """List the components of a kind: name, paper, needs and defaults, read off the classes; or the packaged recipes."""
    if measure:
        if registry_of(kind) is not MODELS:
            raise InputError(f"only models are measured: robustexplain list models --measure, got {kind!r}")
        from . import measured

        typer.echo(measured.page(), nl=False)
        return
    if as_markdown:
        typer.echo(page() if kind == "all" else markdown(kind))
        return
    for each in KINDS if kind == "all" else [kind]:
        print_table(each)


def registry_of(kind: str) -> Registry:
    """The registry of a kind, singular or plural.

    Raises:
        UnknownNameError: with the nearest kinds.
    """
    known = {**ALL, **{registry.kind: registry for registry in ALL.values()}}
    if kind not in known:
        raise UnknownNameError("kind", kind, [*KINDS, "all"])
    return known[kind]


def defaults_of(entry: Entry) -> str:
    """``name=default`` of the settings in a recipe."""
    component: Any = entry.settings or entry.build
    if dataclasses.is_dataclass(component):
        settings = [f for f in dataclasses.fields(component) if f.init and f.metadata.get("recipe", True)]
        pairs = [(f.name, _default(f)) for f in settings if f.name != "model"]
    else:
        parameters = inspect.signature(component).parameters.values()
        pairs = [(p.name, "" if p.default is p.empty else _short(p.default)) for p in parameters]
    return ", ".join(f"{name}={value}" if value else name for name, value in pairs)


def rows_of(kind: str) -> list[tuple[str, str, str, str, str]]:
    """Name, summary, paper, needs and defaults of every component of a kind."""
    return [
        (_written(entry), entry.summary, entry.paper, ", ".join(entry.needs), defaults_of(entry))
        for entry in registry_of(kind)
    ]


def _written(entry: Entry) -> str:
    """How a recipe names it: its name, or, where numbers stand behind it, the form of that (``jpeg-QUALITY``)."""
    form: str = getattr(entry.build, "form", "") if entry in list(TRANSFORMS) else ""
    return form or entry.name


def recipe_rows() -> list[tuple[str, str, str, str]]:
    """Name, what it shows, what it needs and how long it takes, of every packaged recipe, from the head of its file."""
    rows = []
    for name in recipes.names():
        notes = recipes.notes(recipes.path(name))
        shows, needs, takes = (" ".join(notes.get(heading, "").split()) for heading in ("shows", "needs", "takes"))
        rows.append((name, shows, needs, takes))
    return rows


def print_table(kind: str) -> None:
    """Print the table of a kind; plain text where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table

    of_recipes = kind in ("recipes", "recipe")
    table = Table(title=kind, show_lines=True)
    for title, ratio in RECIPE_COLUMNS if of_recipes else COLUMNS:
        table.add_column(title, ratio=ratio, overflow="fold")
    for row in recipe_rows() if of_recipes else rows_of(kind):
        table.add_row(*row)
    # Shapes such as [B, D] are text here, not rich's markup.
    console = Console(markup=False, emoji=False)
    (console if console.is_terminal else Console(width=160, markup=False, emoji=False)).print(table)


def page() -> str:
    """Everything there is as one Markdown page: ``docs/zoo.md``."""
    parts = [
        "# Everything there is",
        "Written by `robustexplain list all --markdown > docs/zoo.md`, from the classes and the recipes themselves.",
    ]
    for kind in sorted(KINDS, key=[*_ABOUT, *KINDS].index):
        parts += [f"## {kind.capitalize()}", *filter(None, [_ABOUT.get(kind)]), markdown(kind)]
    return "\n\n".join(parts)


_ABOUT = {
    "attacks": "Make inputs that deceive a system.",
    "manipulations": "Make systems that deceive: the adversary owns the model, and no input is touched.",
    "defenses": "Make a system harder to deceive.",
    "detectors": "Part of a system: they give each input a score, and an alarm where it is above a threshold.",
    "scanners": "Judge a model that its owner may have manipulated (`robustexplain scan`).",
    "transforms": "Stand in front of a classifier (`input-transform`), or are what a detector looks through.",
    "harmless-changes": "What reaches a system with no adversary: maps and alarms are calibrated on them.",
    "interpreters": "Say which parts of an input a prediction rests on.",
    "metrics": "A number per sample.",
    "objectives": "What an adversary, or a defense in training, wants of logits and maps.",
    "models": "Classifiers by name; any `nn.Module` that takes images in `[0, 1]` will do as well.",
    "datasets": "Data by name, in three disjoint parts: train, defense and test.",
    "recipes": "One experiment each: `robustexplain run NAME`, or `robustexplain copy NAME` to begin from it.",
}


def markdown(kind: str) -> str:
    """Name, summary and paper of every component of a kind, as a Markdown table.

    Attacks also say what they are made of: threat model, objective and search, read off their plans; manipulations,
    what of a system they change; recipes, what they show and need and how long they take.
    """
    if kind in ("recipes", "recipe"):
        return _recipes()
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
        words = [word or "-" for word in entry.build().summaries()]
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


def _recipes() -> str:
    lines = [f"| {' | '.join(title for title, _ in RECIPE_COLUMNS)} |", "| --- " * 4 + "|"]
    for name, *rest in recipe_rows():
        lines.append(f"| `{name}` | " + " | ".join(_plain(text) or "-" for text in rest) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    # A bar inside a cell would end it.
    return text.replace("``", "`").replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _short(field.default)
    return _short(field.default_factory()) if field.default_factory is not dataclasses.MISSING else ""


def _short(value: Any, deep: bool = True) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if not deep:
            return "{...}"
        inside = (f for f in dataclasses.fields(value) if f.init)
        return "{" + ", ".join(f"{f.name}={_short(getattr(value, f.name), deep=False)}" for f in inside) + "}"
    return str(value)
