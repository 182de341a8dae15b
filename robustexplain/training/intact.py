"""Checkpoints with a digest of their content: one that was damaged is not gone on from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .. import files
from ..errors import DamagedFileError

DIGEST = "digest"


def with_digest(tensors: dict[str, Tensor], meta: dict[str, str]) -> dict[str, str]:
    """The metadata with a digest of them and of the tensors."""
    bare = {key: value for key, value in meta.items() if key != DIGEST}
    return {**bare, DIGEST: files.digest([files.digest_tensors(tensors), bare])}


def read_intact(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint; one of an earlier version, which has no digest, is not compared.

    Raises:
        DamagedFileError: it is missing, cut off, or was changed since it was written.
    """
    tensors, meta = files.read_tensors(path)
    if DIGEST in meta and meta[DIGEST] != with_digest(tensors, meta)[DIGEST]:
        raise DamagedFileError(f"{path} is damaged: its digest is not the one of its content")
    return tensors, meta
