"""Reading YAML that may be hostile: bounded before anything is built, and no key twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import InputError
from ..schema import DEPTH, MOST

LONGEST = 1_000_000
"""Characters of a file."""
NODES = 100_000
"""Values of a file, those that aliases (``*name``) repeat counted each time."""


class _Loader(yaml.SafeLoader):
    """The safe loader with whole numbers that fit into 64 bits."""


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        value: int = yaml.SafeLoader.construct_yaml_int(loader, node)
    except ValueError:
        # Python reads no number of thousands of digits.
        value = MOST + 1
    if abs(value) > MOST:
        raise InputError(f"line {node.start_mark.line + 1}: a whole number must be below 2^63")
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def load(text: str) -> Any:
    """Plain data from YAML text.

    Raises:
        InputError: not YAML, a key that stands twice in one mapping, or a file that is too long, too deep, or too large
            once its aliases are written out; with the line.
    """
    if len(text) > LONGEST:
        raise InputError(f"longer than {LONGEST} characters")
    try:
        _Census().take(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise InputError(f"is not YAML: {error}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        # Such as text that looks like a date and is none.
        raise InputError(f"is not YAML: {error}") from None


@dataclass
class _Open:
    """A list or mapping that is being read.

    Args:
        anchor: its name, if aliases may repeat it.
        mapping: whether it is a mapping.
        size: values in it so far.
        children: keys and values so far.
        keys: the line of each of its keys.
    """

    anchor: str | None
    mapping: bool
    size: int = 1
    children: int = 0
    keys: dict[str, int] = field(default_factory=dict)


class _Census:
    """Counts what a file would become, from the parser's events: nothing is built, nothing recurses."""

    def __init__(self) -> None:
        self.open: list[_Open] = []
        self.sizes: dict[str, int] = {}

    def take(self, text: str) -> None:
        """Look at the whole file.

        Raises:
            InputError: what :func:`load` refuses.
        """
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 0
            tag = getattr(event, "tag", None)
            if tag not in (None, "tag:yaml.org,2002:str"):
                raise InputError(f"is not YAML of plain data: line {line} has the tag {tag!r}")
            if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
                if len(self.open) == DEPTH:
                    raise InputError(f"line {line}: lists and mappings stand in one another more than {DEPTH} deep")
                self.open.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                done = self.open.pop()
                self._count(done.size, done.anchor, line)
            elif isinstance(event, yaml.ScalarEvent):
                self._key(event, line)
                self._count(1, event.anchor, line)
            elif isinstance(event, yaml.AliasEvent):
                self._count(self._repeated(str(event.anchor), line), None, line)

    def _repeated(self, anchor: str, line: int) -> int:
        if any(part.anchor == anchor for part in self.open):
            raise InputError(f"line {line}: *{anchor} stands inside of &{anchor} itself")
        # The loader refuses an unknown anchor.
        return self.sizes.get(anchor, 1)

    def _count(self, size: int, anchor: str | None, line: int) -> None:
        if anchor is not None:
            self.sizes[anchor] = size
        if not self.open:
            return
        self.open[-1].size += size
        self.open[-1].children += 1
        if self.open[-1].size > NODES:
            raise InputError(f"line {line}: more than {NODES} values, those that aliases repeat counted each time")

    def _key(self, event: yaml.ScalarEvent, line: int) -> None:
        inside = self.open[-1] if self.open else None
        if inside is None or not inside.mapping or inside.children % 2:
            return
        if event.value in inside.keys and event.value != "<<":
            raise InputError(
                f"line {line}: the key {event.value!r} stands there already, on line {inside.keys[event.value]}"
            )
        inside.keys[event.value] = line
