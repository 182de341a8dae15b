"""Error messages that are collected, so that a check of a recipe reports all of them."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, MissingDataError


class Problems:
    """Collects error messages, so that a check of a recipe reports all of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.missing: list[str] = []

    def add(self, line: str) -> None:
        """One more message."""
        self.lines.append(line)

    def run(self, step: Any, path: str = "") -> Any:
        """The result of ``step()``; or ``None``, and its error is collected."""
        try:
            return step()
        except InputError as error:
            lines = self.missing if isinstance(error, MissingDataError) else self.lines
            lines.append(f"{path}: {error}" if path else str(error))
            return None

    def each(self, entries: Any, step: Any, path: str) -> list[Any]:
        """``step(entry, path)`` for each entry of a list, without those that have mistakes in them."""
        if not isinstance(entries, list):
            self.add(f"{path}: a list is needed, got {entries!r}")
            return []
        made = (self.run(lambda i=i, e=e: step(e, f"{path}[{i}]")) for i, e in enumerate(entries))
        return [value for value in made if value is not None]

    def stop(self) -> None:
        """Raise the messages, if there are any."""
        if self.lines or self.missing:
            kind = InputError if self.lines else MissingDataError
            raise kind("\n".join(self.missing + self.lines))
