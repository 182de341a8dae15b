"""One random stream per sample, so that a sample's result does not depend on its batch.

A stream is seeded from the run's seed and the sample's own values: the same image draws the same noise wherever it
stands in a batch, and on which of several processes. The global random state is never touched.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *words: object) -> int:
    """A 63-bit seed from a seed and any words: stable across runs and machines."""
    text = ":".join([str(seed), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *words: object) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, *words))


_global_state = threading.RLock()


@contextmanager
def global_state(device: torch.device) -> Iterator[None]:
    """Restore the global random states (torch, numpy, python) after the block, which one thread enters at a time.

    For code of others that draws from them: two threads at once would get each other's draws.
    """
    with _global_state:
        states = np.random.get_state(), random.getstate()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                yield
        finally:
            np.random.set_state(states[0])  # noqa: NPY002
            random.setstate(states[1])


def seed_global_state(seed: int, device: torch.device) -> None:
    """Seed what :func:`global_state` restores. ``torch.manual_seed`` would seed every other CUDA device as well."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


_frozen: ContextVar[bool] = ContextVar("frozen", default=False)


@contextmanager
def frozen() -> Iterator[None]:
    """Inside the block all inputs have the same draws: a random system becomes a fixed function of its input."""
    token = _frozen.set(True)
    try:
        yield
    finally:
        _frozen.reset(token)


@dataclass(frozen=True)
class Streams:
    """A generator per sample of a batch; draws come back on the device and in the dtype asked for."""

    generators: tuple[torch.Generator, ...]

    @classmethod
    def of(cls, x: Tensor, seed: int, *words: object) -> Streams:
        """Streams for the samples of ``x``, from their content; inside :func:`frozen` equal ones."""
        if _frozen.get():
            return cls(tuple(generator(seed, "frozen", *words) for _ in range(len(x))))
        rows = x.detach().to("cpu", torch.float32).flatten(1).contiguous().numpy()
        hashes = [hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=8).hexdigest() for row in rows]
        return cls(tuple(generator(seed, h, *words) for h in hashes))

    def select(self, rows: Tensor | Sequence[int]) -> Streams:
        """The streams of some samples: they go on where they were."""
        indices = rows.tolist() if isinstance(rows, Tensor) else rows
        return Streams(tuple(self.generators[i] for i in indices))

    def uniform(self, like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform draws of the shape of ``like``, whose first dimension is the batch."""
        return self._draw(like, torch.rand) * (high - low) + low

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal draws of the shape of ``like``."""
        return self._draw(like, torch.randn)

    def integers(self, high: int) -> Tensor:
        """One integer in ``[0, high)`` a sample, int64 ``[B]`` on the CPU."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.generators])

    def _draw(self, like: Tensor, how: object) -> Tensor:
        shape = like.shape[1:]
        # In float32 always: torch's default dtype would change the draws.
        made = [how(shape, generator=g, dtype=torch.float32) for g in self.generators]  # type: ignore[operator]
        draws = torch.stack(made)
        return draws.to(like.device, like.dtype)
