"""States of modules and generators that hold for the length of a block and are then as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import InputError


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
def left_alone(model: nn.Module, component: object) -> Iterator[None]:
    """Refuse a component of the user's own that changes a given model in place, and put weights and modes back.

    A run makes all of its rows before it judges any: the others would be judged with the changed weights. Components of
    this library copy what they train.

    Raises:
        InputError: naming the component.
    """
    if type(component).__module__.split(".")[0] == "robustexplain":
        yield
        return
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    modes = [(part, part.training) for part in model.modules()]
    try:
        yield
    finally:
        now = model.state_dict()
        gone = sorted(weights.keys() ^ now.keys())
        changed = gone or [n for n, value in weights.items() if not same(now[n].detach().cpu(), value)]
        moved = any(part.training != mode for part, mode in modes)
        if changed:
            # Parts that were replaced cannot be put back; all others are.
            model.load_state_dict(weights, strict=False)
        for part, mode in modes:
            part.training = mode
    if changed or moved:
        what = f"weights of the given system in place, {changed[0]!r} first" if changed else "the mode of its model"
        raise InputError(
            f"{type(component).__name__} changed {what}: train a copy (copy.deepcopy; a ModelDefense is given one)"
        )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same, NaN included."""
    if a.shape != b.shape:
        return False
    alike = a == b
    return bool((alike | (a.isnan() & b.isnan()) if a.is_floating_point() else alike).all())


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
