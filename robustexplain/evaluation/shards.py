"""Chunks of inputs that processes share, each a file: what is there is not made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .. import files
from ..errors import DamagedFileError, recorded
from ..training import Session
from .store import RunFolder


class Part(Protocol):
    """Some inputs with their place among all."""

    @property
    def index(self) -> int:
        """The place."""
        ...

    @property
    def x(self) -> Tensor:
        """The inputs."""
        ...


P = TypeVar("P", bound=Part)
NO_LIMIT: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Shards:
    """The chunks of a run.

    Args:
        folder: its directory.
        session: the processes that share them.
    """

    folder: RunFolder
    session: Session

    def make(
        self,
        kind: str,
        name: str,
        parts: Sequence[P],
        make: Callable[[P], dict[str, Tensor]],
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """Make every chunk that is not there yet: this process its share, the others theirs."""
        for part in parts:
            self.make_one(kind, name, part, make, part.index)
            advance(1)
        self.session.accelerator.wait_for_everyone()

    def make_one(self, kind: str, name: str, part: P, make: Callable[[P], dict[str, Tensor]], turn: int) -> None:
        """Make one chunk that is not there yet, if ``turn`` is one of this process's; the others do not wait."""
        accelerator, path = self.session.accelerator, self.folder.chunk(kind, name, part.index)
        if turn % accelerator.num_processes != accelerator.process_index or self._whole(path):
            return
        try:
            files.write_tensors(path, make(part))
            self.folder.error(kind, name, part.index).unlink(missing_ok=True)
        except Exception as error:
            if files.is_full(error):
                raise
            files.write_text(self.folder.error(kind, name, part.index), recorded(error))

    def _whole(self, path: Path) -> bool:
        """Whether a chunk is there; a damaged one is made anew."""
        if not path.is_file():
            return False
        try:
            files.read_metadata(path)
        except DamagedFileError as error:
            self.session.progress.say(f"damaged: {error}; it is made anew")
            return False
        return True

    def read(self, kind: str, name: str, part: Part) -> dict[str, Tensor]:
        """The arrays of a chunk, on the device of its inputs.

        Raises:
            ChunkFailedError: it could not be made.
        """
        return {key: value.to(part.x.device) for key, value in self._read(kind, name, part.index).items()}

    def read_all(self, kind: str, name: str, count: int, most: Mapping[str, int] = NO_LIMIT) -> dict[str, Tensor]:
        """The arrays of all chunks, one after the other, on the CPU.

        Args:
            kind: of the chunks.
            name: of the chunks.
            count: how many there are.
            most: how many samples are kept of some arrays, the first ones; of others all are.

        Raises:
            ChunkFailedError: one of them could not be made.
        """
        found: dict[str, list[Tensor]] = {}
        for index in range(count):
            for key, value in self._read(kind, name, index).items():
                parts = found.setdefault(key, [])
                parts.append(value[: most[key] - sum(map(len, parts))].clone() if key in most else value)
        return {key: torch.cat(parts) for key, parts in found.items()}

    def _read(self, kind: str, name: str, index: int) -> dict[str, Tensor]:
        path, error = self.folder.chunk(kind, name, index), self.folder.error(kind, name, index)
        if path.is_file():
            return files.read_tensors(path)[0]
        missing = f"{path} is missing"
        raise ChunkFailedError(error.read_text(encoding="utf-8", errors="replace") if error.is_file() else missing)


class ChunkFailedError(Exception):
    """A chunk could not be made; the message is the traceback."""
