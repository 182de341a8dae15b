"""Running a user's own Python file: only if the user has allowed its code to run, and only unchanged."""

from __future__ import annotations

import hashlib
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, MissingDataError


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, as hex.

    Raises:
        MissingDataError: no such file.
    """
    return hashlib.sha256(_content(Path(path))).hexdigest()


@dataclass(frozen=True)
class OwnCode:
    """A name in a Python file of the user's own.

    Args:
        file: the file.
        name: a class or function that stands in it.
        sha256: of the file; ``None`` for whatever it holds. Another content is refused before anything runs.
        trusted: whether the user has allowed the file's code to run.
    """

    file: str
    name: str
    sha256: str | None = None
    trusted: bool = False

    def found(self) -> Callable[..., Any]:
        """Run the file and return its object called ``name``.

        Raises:
            InputError: not trusted, changed, no Python, an exception in it, or no such name.
            MissingDataError: no such file.
        """
        if not self.trusted:
            raise InputError(
                f"this would run the code of {self.file} ({self.name}); if you trust that file, say so: --trust-code"
            )
        content = _content(Path(self.file))
        seen = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, seen):
            raise InputError(
                f"{self.file} is another file than the recipe's: its SHA-256 is {seen}, expected {self.sha256}"
            )
        place = hashlib.sha256(f"{Path(self.file).resolve()}:{seen}".encode()).hexdigest()
        module = self._run(content, f"robustexplain_own_{place[:16]}")
        value = getattr(module, self.name, None)
        if not callable(value):
            known = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
            raise InputError(
                f"{self.file} has no class or function {self.name!r}; it has {', '.join(known) or 'none of its own'}"
            )
        found: Callable[..., Any] = value
        return found

    def called(self, options: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
        """What the class or function gives, with ``options`` and those of ``offered`` that it takes.

        Raises:
            InputError: an option that it does not take, one that it needs and is not given, or an exception in it.
        """
        call = self.found()
        try:
            known = inspect.signature(call).parameters
        except (TypeError, ValueError):
            known = {}  # type: ignore[assignment]  # a class written in C has no signature
        anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
        unknown = [key for key in options if key not in known and not anything]
        if unknown:
            raise InputError(f"{self.name} of {self.file} has no option {unknown[0]!r}; it has {', '.join(known)}")
        given = {**{key: value for key, value in offered.items() if key in known}, **options}
        return self.guarded(lambda: call(**given))

    def guarded(self, step: Callable[[], Any]) -> Any:
        """The result of ``step()``; an exception in the user's code becomes one line with its place.

        Raises:
            InputError: with the exception's type, its text, and the line of the file.
        """
        try:
            return step()
        except InputError:
            raise
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == self.file]
            where = f", line {frames[-1].lineno}" if frames else ""
            message = " ".join(str(error).split())
            raise InputError(f"{self.file}{where} ({self.name}): {type(error).__name__}: {message}") from error

    def _run(self, content: bytes, name: str) -> ModuleType:
        if name in sys.modules:
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = self.file
        # Dataclasses, torch.fx and data loaders' workers look a class's module up by name.
        sys.modules[name] = module
        try:
            # The code that was hashed runs, even if the file has changed since.
            self.guarded(lambda: exec(compile(content, self.file, "exec"), module.__dict__))
        except BaseException:
            del sys.modules[name]
            raise
        linecache.checkcache(self.file)
        return module


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise MissingDataError(f"no Python file at {path}")
    return path.read_bytes()
