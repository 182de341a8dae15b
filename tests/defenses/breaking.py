"""Attacks that are built to break certificates, and what they broke."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.autograd.straight_through import straight_through
from robustexplain.interpreters import Certificate, Certified, Interpreter
from robustexplain.interpreters import Sparsified as SparsifiedMap
from robustexplain.interpreters.composed.binomial import bounds

SURE = 1e-7
"""The chance at which fresh draws are taken for a violation, for each cell."""
STEP_DRAWS = 64
"""Fresh draws of a step of the attack over them, at most."""
LOOKED_AT = 80
"""Fresh draws of every attacked input; those that look broken are judged by more."""


def pushed(loss: Callable[[Tensor, int], Tensor], x: Tensor, radius: float, smooth: bool, steps: int = 3) -> Tensor:
    """Inputs within ``radius`` (L2) that lower ``loss``, in steps of normalised gradients.

    With ``smooth`` through a softplus: the derivative of a gradient map on rectifiers is zero.
    """
    moved = torch.zeros_like(x)
    for step in range(steps):
        at = (x + moved).requires_grad_()
        with straight_through(), swapped(Softplus(10.0)) if smooth else nullcontext():
            (gradient,) = torch.autograd.grad(loss(at, step).sum(), at)
        assert bool(gradient.flatten(1).any(1).float().mean() > 0.5), "an attack without a direction breaks nothing"
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
        few = replace(interpreter, samples=min(interpreter.samples, STEP_DRAWS), seed=100 + step)
        return -(wanted * few.explain(at, classes, native=True).maps).flatten(1).mean(1)

    smooth = interpreter.base.is_gradient
    return [pushed(loss, x, interpreter.radius, smooth) for loss in (inside, smoothed, fresh)]


def certificate_of(interpreter: Interpreter, x: Tensor, classes: Tensor) -> Certificate:
    with torch.no_grad():
        found = interpreter.explain(x, classes).certificate
    assert found is not None
    return found


def flipped(
    interpreter: Certified, x: Tensor, classes: Tensor, draws: int = 150, others: Iterable[Tensor] = ()
) -> Tensor:
    """Bool ``[B]``: inputs with a certified cell of which most copies of an attacked input find the contrary.

    Args:
        draws: fresh ones, that judge.
        others: attacked inputs besides those of :func:`attacked`.
    """
    proved = certificate_of(interpreter, x, classes)
    assert proved.decided is not None
    wanted = -torch.where(proved.decided == -1, 0, 2 * proved.decided - 1).float()

    def broken(hits: Tensor, rows: Tensor, draws: int, chance: float) -> Tensor:
        low, high = bounds(draws, chance, "clopper-pearson")
        decided = proved.decided[rows]  # type: ignore[index]
        wrong = ((decided == 1) & (high[hits] < 0.5)) | ((decided == 0) & (low[hits] > 0.5))
        return wrong.flatten(1).any(1)

    inputs = (x, *attacked(interpreter, x, wanted, classes), *others)
    # Of cells on the wrong side, 1 in 10,000 is overlooked.
    return judged(interpreter, inputs, classes, draws, broken, suspicious=0.9999)


def lost(
    interpreter: SparsifiedMap, x: Tensor, classes: Tensor, draws: int = 150, others: Iterable[Tensor] = ()
) -> Tensor:
    """Bool ``[B]``: inputs whose top keeps less than the certificate says of an attacked input; as :func:`flipped`."""
    proved = certificate_of(interpreter, x, classes)
    assert proved.overlap is not None
    k = proved.top
    top = proved.scores.flatten(1) >= proved.scores.flatten(1).topk(k, 1).values[:, -1:]
    wanted = 1 - 2 * top.float().reshape(proved.scores.shape)

    def broken(hits: Tensor, rows: Tensor, draws: int, chance: float) -> Tensor:
        low, high = bounds(draws, chance, "clopper-pearson")
        share = hits.flatten(1)
        could_stay = high[share] >= low[share].topk(k, 1).values[:, -1:]
        return (top[rows] & could_stay).sum(1) < (proved.overlap[rows] * k).round()  # type: ignore[index]

    inputs = (x, *attacked(interpreter, x, wanted, classes), *others)
    # Shares as they are seen: a loss that the judge could find is overlooked in some per cent.
    return judged(interpreter, inputs, classes, draws, broken, suspicious=0.5)


def judged(
    interpreter: Certified | SparsifiedMap,
    inputs: Iterable[Tensor],
    classes: Tensor,
    draws: int,
    broken: Callable[[Tensor, Tensor, int, float], Tensor],
    suspicious: float,
) -> Tensor:
    """Bool ``[B]``: which inputs are broken by any of ``inputs``, as fresh draws show.

    All are looked at with few draws; those that are broken at the chance ``suspicious`` are judged by other, more ones.
    """
    found = torch.zeros(len(classes), dtype=torch.bool)
    for moved in inputs:
        rows = (~found).nonzero()[:, 0]
        for count, seed, chance in ((LOOKED_AT, 998, suspicious), (draws, 999, SURE)):
            if not len(rows):
                break
            judge = replace(interpreter, samples=count, seed=seed)
            scores = certificate_of(judge, moved[rows], classes[rows]).scores
            rows = rows[broken((scores * count).round().long(), rows, count, chance)]
        found[rows] = True
    return found
