"""Random goal classes and goal maps, drawn from each sample's own stream."""

from __future__ import annotations

import torch
from torch import Tensor

from robustexplain import checks
from robustexplain.errors import InputError
from robustexplain.interpreters.base import Interpreter
from robustexplain.random_streams import Streams


def random_classes(x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Tensor:
    """``[B]``: for each sample a class other than ``y``, all equally likely (Zhang et al. 2020, section 4)."""
    checks.classes(y, len(x), num_classes, "y")
    if num_classes < 2:
        raise InputError(f"a goal class needs two classes, the model has {num_classes}")
    offsets = Streams.of(x, seed, "goal-class").integers(num_classes - 1).to(y.device) + 1
    return (y + offsets) % num_classes


def random_patch_maps(x: Tensor, seed: int = 0) -> Tensor:
    """``[B, H, W]``: 1 inside a rectangle or circle of random size, angle and position, 0 outside (section 5, Q1)."""
    height, width = x.shape[-2:]
    draws = Streams.of(x, seed, "random-patch").uniform(x.new_empty(len(x), 6))
    kind, angle, cy, cx, a, b = (draws[:, i, None, None] for i in range(6))
    rows = torch.linspace(0, 1, height, device=x.device, dtype=x.dtype)[None, :, None]
    columns = torch.linspace(0, 1, width, device=x.device, dtype=x.dtype)[None, None, :]
    dy, dx = rows - (0.2 + 0.6 * cy), columns - (0.2 + 0.6 * cx)
    turn = angle * torch.pi
    along, across = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    half, other = 0.12 + 0.18 * a, 0.12 + 0.18 * b
    rectangle = (along.abs() <= half) & (across.abs() <= other)
    circle = dx.square() + dy.square() <= half.square()
    return torch.where(kind < 0.5, rectangle, circle).to(x.dtype)


def random_class_maps(
    interpreter: Interpreter, x: Tensor, goal_class: Tensor, pool_x: Tensor, pool_y: Tensor, seed: int = 0
) -> Tensor:
    """``[B, H, W]``: the benign map of a random pool image whose class is not ``goal_class`` (section 5, Q1).

    Args:
        interpreter: explains each pool image for its own class.
        x: the inputs to be attacked; only their random streams are used.
        goal_class: ``[B]``.
        pool_x: benign images ``[N, C, H, W]``, at least one a class.
        pool_y: their classes ``[N]``.
        seed: of the draw.
    """
    streams = Streams.of(x, seed, "random-class-map")
    draws = streams.uniform(x.new_empty(len(x), len(pool_x)))
    draws = draws.masked_fill(pool_y.to(x.device)[None] == goal_class.to(x.device)[:, None], -1)
    best, chosen = draws.max(1)
    if bool((best < 0).any()):
        raise InputError("the pool has no image of another class than the goal class")
    with torch.no_grad():
        return interpreter(pool_x.to(x)[chosen], pool_y.to(x.device)[chosen])
