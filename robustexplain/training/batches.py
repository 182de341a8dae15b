"""Which samples a process sees when: the same batches whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..errors import InputError
from ..random_streams import generator
from .settings import Training


@dataclass(frozen=True)
class Batches:
    """The micro batches of a training, as they fall to one of several processes.

    Args:
        size: number of samples.
        batch: samples an optimiser step.
        micro: samples a forward pass.
        seed: of the order.
        index: which process this is ...
        processes: ... of how many.

    Raises:
        InputError: nothing to train on, or a batch that cannot be divided among the processes.
    """

    size: int
    batch: int
    micro: int
    seed: int
    index: int
    processes: int

    @classmethod
    def of(cls, settings: Training, size: int, seed: int, accelerator: Accelerator) -> Batches:
        """The batches of a process of ``accelerator``."""
        if size == 0:
            raise InputError("there is nothing to train on: the data set is empty")
        batch, processes = min(settings.batch_size, size), accelerator.num_processes
        default = batch // (processes * accelerator.gradient_accumulation_steps)
        micro = min(settings.micro_batch or default, batch)
        if micro == 0 or (batch // micro) % processes:
            raise InputError(
                f"a batch of {batch} in micro batches of {micro} cannot be divided evenly among {processes} processes"
            )
        return cls(size, batch, micro, seed, accelerator.process_index, processes)

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch."""
        return self.size // self.batch

    @property
    def share(self) -> int:
        """Micro batches of a batch that fall to each process."""
        return self.batch // self.micro // self.processes

    def epoch(self, epoch: int) -> Iterator[list[int]]:
        """This process's micro batches, in order: batch after batch, every ``processes``-th micro batch of each."""
        order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch)).tolist()
        for step in range(self.steps):
            batch = order[step * self.batch : (step + 1) * self.batch]
            for i in range(self.index, self.batch // self.micro, self.processes):
                yield batch[i * self.micro : (i + 1) * self.micro]
