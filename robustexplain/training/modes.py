"""States of modules and generators that hold for the length of a block and are then as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def global_noise(device: torch.device, seed: int) -> Iterator[None]:
    """Dropout and its like draw from the global generators: seeded in this block, and afterwards as they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` requires grad for the length of a block; each flag is restored afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        # Not model.requires_grad_, which a scripted model does not have.
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every part of ``model`` is in eval mode for the length of a block; each part's mode is restored afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for part, mode in modes:
            # Not train(): it would set the parts' modes too, and a part may be in another mode than the whole.
            part.training = mode
