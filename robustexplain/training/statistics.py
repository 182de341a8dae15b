"""Running statistics of batch norms: one update a step, which all micro batches and processes see alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Statistics:
    """The running statistics of a module in training.

    Only the first micro batch of each batch updates them, whichever process it falls to: data-parallel training keeps
    the first process's statistics, and one process must do the same to get the same model. They change when the step
    is done and not before: a loss that asks the module in eval mode, as an attack inside of it does, finds the same
    ones for every micro batch.

    Args:
        module: in training.
        divided: whether a step has more than one micro batch.
    """

    def __init__(self, module: nn.Module, divided: bool) -> None:
        self.divided = divided
        self.norms: list[Any] = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
        self.pending: list[Tensor] = []

    @property
    def buffers(self) -> list[Tensor]:
        """As they are now: data-parallel wrapping puts others in their place."""
        return [buffer for norm in self.norms for buffer in norm.buffers(recurse=False)]

    @contextmanager
    def of_micro_batch(self, first: bool) -> Iterator[None]:
        """Updates are held back for the length of a block; those of the ``first`` micro batch are remembered."""
        if not self.divided:
            yield
            return
        # An instance norm without the flag uses the input's own statistics in eval mode too: it keeps the flag.
        batch = [norm for norm in self.norms if isinstance(norm, _BatchNorm)]
        put_back = first or len(batch) < len(self.norms)
        before = [buffer.clone() for buffer in self.buffers] if put_back else []
        try:
            for norm in batch:
                norm.track_running_stats = first
            yield
        finally:
            for norm in batch:
                norm.track_running_stats = True
            if first:
                self.pending = [buffer.clone() for buffer in self.buffers]
            if put_back:
                self._set(before)

    def update(self, processes: int) -> None:
        """Take over the first micro batch's statistics, in every process, at the end of a step."""
        self._set(self.pending)
        self.pending = []
        floats = [buffer for buffer in self.buffers if buffer.is_floating_point()]
        if processes > 1 and floats:
            shared = broadcast(torch.cat([buffer.flatten() for buffer in floats]))
            parts = shared.split([buffer.numel() for buffer in floats])
            for buffer, part in zip(floats, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=bool(values)):
            buffer.copy_(value)
