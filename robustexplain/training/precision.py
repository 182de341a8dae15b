"""Mixed precision that begins and ends with a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..errors import InputError

_MARK = "_is_accelerate_prepared"


def check_precision(accelerator: Accelerator) -> None:
    """Refuse half precision where there is none: Accelerate would train in single precision without a word.

    Raises:
        InputError: float16 on a CPU.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError(
            "mixed precision 'fp16' needs a GPU, and this process has none; launch it with --mixed_precision bf16 or no"
        )


@contextmanager
def prepared(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """Module and optimiser as Accelerate trains them; afterwards the module is what it was, in its own precision.

    Accelerate puts autocast into ``module.forward`` and leaves it there, marks the module as prepared, and keeps both
    for as long as it lives: attacks on the trained module would run in its precision, and a second training of the
    same module would not be prepared again.
    """
    scale = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    wrapped, ready = accelerator.prepare(module, optimizer)
    try:
        yield wrapped, ready
    finally:
        _set_forward(module, _own_forward(module))
        for part in (module, wrapped):
            part.__dict__.pop("_original_forward", None)
            part.__dict__.pop(_MARK, None)
        accelerator._models = [m for m in accelerator._models if m is not wrapped]
        accelerator._optimizers = [o for o in accelerator._optimizers if o is not ready]
        if scale is not None:
            accelerator.scaler.load_state_dict(scale)


@contextmanager
def own_precision(module: nn.Module) -> Iterator[None]:
    """The module computes as it does outside of training for the length of a block."""
    mixed = module.__dict__.get("forward")
    try:
        _set_forward(module, _own_forward(module))
        yield
    finally:
        _set_forward(module, mixed)


def _own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A forward of the object's own, if it had one before Accelerate; ``None`` for that of its class."""
    own = module.__dict__.get("_original_forward", module.__dict__.get("forward"))
    return None if getattr(own, "__func__", None) is type(module).forward else own


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    module.__dict__.pop("forward", None)
    if forward is not None:
        module.__dict__["forward"] = forward
