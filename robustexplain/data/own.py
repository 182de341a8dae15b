"""A data set of the user's own, from a Python file that the user trusts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..own_code import OwnCode
from .base import Data


@dataclass(frozen=True)
class OwnData:
    """A data set that a class or function of the user's own makes.

    Args:
        file: a Python file; its code runs only with ``--trust-code``.
        name: what in it makes a :class:`Data`, or something whose ``load()`` does.
        options: its keyword arguments.
        sha256: of ``file``, filled in when the recipe is read; another content is refused.
        trusted: whether the user trusts ``file``; no recipe can say so.
    """

    file: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    trusted: bool = field(default=False, metadata={"recipe": False})

    @property
    def code(self) -> OwnCode:
        """What would run."""
        return OwnCode(self.file, self.name, self.sha256, self.trusted)

    def load(self) -> Data:
        """Run the file and take its data.

        Raises:
            InputError: not trusted, an exception in it, or something else than a :class:`Data`.
            MissingDataError: no such file.
        """
        made = self.code.called(self.options, {})
        if not isinstance(made, Data) and callable(getattr(made, "load", None)):
            made = self.code.guarded(made.load)
        if not isinstance(made, Data):
            raise InputError(
                f"{self.name} of {self.file} must make a robustexplain.data.Data, got {type(made).__name__}"
            )
        return made
