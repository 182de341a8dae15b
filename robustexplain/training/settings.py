"""How something is trained: epochs, batches, optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..fields import Count, Natural, NonNegative, Positive, check_fields


@dataclass(frozen=True)
class Training:
    """How something is trained.

    Args:
        epochs: passes over the data.
        batch_size: samples an optimiser step, over all processes.
        micro_batch: samples a forward pass; default ``batch_size`` over the number of processes. Set it to make the
            result the same on any number of processes that divides ``batch_size / micro_batch``.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: ``one_cycle`` (a linear rise over the first fifth, then a cosine to zero) or ``constant``.
        clip: largest norm of the gradient; 0 does not clip.
        workers: processes that load data, for each training process.
    """

    epochs: Count = 10
    batch_size: Count = 64
    micro_batch: Count | None = None
    lr: Positive = 2e-3
    weight_decay: NonNegative = 1e-4
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    clip: NonNegative = 1.0
    workers: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise InputError(
                f"Training.micro_batch must divide batch_size, got {self.micro_batch} and {self.batch_size}"
            )

    def rate(self, progress: float) -> float:
        """The learning rate at ``progress`` in ``[0, 1]`` of all steps."""
        if self.schedule == "constant":
            return self.lr
        rise = 0.2
        if progress < rise:
            return self.lr * (0.04 + 0.96 * progress / rise)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))
