"""Attacks that are built to break certificates, and what they broke."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from robustexplain.autograd.straight_through import straight_through
from robustexplain.interpreters import Certificate, Certified, Interpreter
from robustexplain.interpreters import Sparsified as SparsifiedMap
from robustexplain.interpreters.composed.binomial import bounds

SURE = 1e-7
"""The chance at which fresh draws are taken for a violation, for each cell."""


def pushed(loss: Callable[[Tensor, int], Tensor], x: Tensor, radius: float, steps: int = 3) -> Tensor:
    """Inputs within ``radius`` (L2) that lower ``loss``, in steps of normalised gradients."""
    moved = torch.zeros_like(x)
    for step in range(steps):
        at = (x + moved).requires_grad_()
        with straight_through():
            (gradient,) = torch.autograd.grad(loss(at, step).sum(), at)
        moved = moved - radius / 2 * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        moved = moved * (radius / moved.flatten(1).norm(dim=1).clamp(min=radius))[:, None, None, None]
    return (x + 0.999 * moved).detach()


def attacked(interpreter: Certified | SparsifiedMap, x: Tensor, wanted: Tensor, classes: Tensor) -> list[Tensor]:
    """Three attacks that raise ``wanted`` ``[B, g, g]``: on the map inside, on the smoothed map, over fresh draws."""
    grid = interpreter.grid

    def inside(at: Tensor, step: int) -> Tensor:
        maps = interpreter.base.explain(at, classes, native=True).maps
        scaled = maps / maps.detach().abs().flatten(1).amax(1)[:, None, None]
        return -(wanted * torch.nn.functional.adaptive_avg_pool2d(scaled, grid)).flatten(1).mean(1)

    def smoothed(at: Tensor, step: int) -> Tensor:
        return -(wanted * interpreter.explain(at, classes, native=True).maps).flatten(1).mean(1)

    def fresh(at: Tensor, step: int) -> Tensor:
        return -(wanted * interpreter.redrawn(100 + step).explain(at, classes, native=True).maps).flatten(1).mean(1)

    return [pushed(loss, x, interpreter.radius) for loss in (inside, smoothed, fresh)]


def certificate_of(interpreter: Interpreter, x: Tensor, classes: Tensor) -> Certificate:
    with torch.no_grad():
        found = interpreter.explain(x, classes).certificate
    assert found is not None
    return found


def flipped(interpreter: Certified, x: Tensor, classes: Tensor, draws: int = 150) -> int:
    """Certified cells of which most copies of an attacked input find the contrary, as fresh draws show."""
    proved = certificate_of(interpreter, x, classes)
    assert proved.decided is not None
    wanted = -torch.where(proved.decided == -1, 0, 2 * proved.decided - 1).float()
    broken, judge = 0, replace(interpreter, samples=draws, seed=999)
    low, high = bounds(draws, SURE, "clopper-pearson")
    for moved in (x, *attacked(interpreter, x, wanted, classes)):
        assert bool(((moved - x).flatten(1).norm(dim=1) <= proved.radius).all())
        share = (certificate_of(judge, moved, classes).scores * draws).round().long()
        broken += int(((proved.decided == 1) & (high[share] < 0.5)).sum())
        broken += int(((proved.decided == 0) & (low[share] > 0.5)).sum())
    return broken


def lost(interpreter: SparsifiedMap, x: Tensor, classes: Tensor, draws: int = 150) -> int:
    """Inputs whose top keeps less than the certificate says, as fresh draws show of an attacked input."""
    proved = certificate_of(interpreter, x, classes)
    assert proved.overlap is not None
    k = proved.top
    top = proved.scores.flatten(1) >= proved.scores.flatten(1).topk(k, 1).values[:, -1:]
    wanted = 1 - 2 * top.float().reshape(proved.scores.shape)
    broken, judge = 0, replace(interpreter, samples=draws, seed=999)
    low, high = bounds(draws, SURE, "clopper-pearson")
    for moved in (x, *attacked(interpreter, x, wanted, classes)):
        share = (certificate_of(judge, moved, classes).scores.flatten(1) * draws).round().long()
        could_stay = high[share] >= low[share].topk(k, 1).values[:, -1:]
        broken += int(((top & could_stay).sum(1) < (proved.overlap * k).round()).sum())
    return broken
