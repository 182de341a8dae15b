"""Choosing a setting of an interpreter's defense on clean inputs that the evaluation does not use."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustexplain.data import stack
from robustexplain.door import answer, suited
from robustexplain.errors import InputError
from robustexplain.interpreters import Interpreter
from robustexplain.random_streams import generator
from robustexplain.system import System
from robustexplain.training import Samples

DIGITS = 3
"""Significant digits of what a search chooses: differences in last bits between machines then rarely show."""


def clean_inputs(system: System, data: Samples | None, images: int, seed: int) -> Tensor:
    """Up to ``images`` of the defense's samples, drawn by ``seed``, on the model's device and in its dtype."""
    if data is None or not len(data):
        raise InputError("this needs data: samples that the evaluation does not use")
    chosen = torch.randperm(len(data), generator=generator(seed, "calibration"))[:images].tolist()
    return suited(system.model, stack(data, chosen)[0])


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """``[N]``: the class that is explained of each input."""
    return torch.cat([answer(model, part).argmax(1) for part in x.split(batch_size)])


@torch.no_grad()
def maps_of(interpreter: Interpreter, x: Tensor, classes: Tensor, batch_size: int) -> Tensor:
    """``[N, ...]``: the maps of these classes."""
    parts = zip(x.split(batch_size), classes.split(batch_size), strict=True)
    return torch.cat([interpreter.explain(part, target).maps for part, target in parts])


def least_that_holds(
    value: Callable[[float], float], level: float, low: float, high: float, steps: int = 10
) -> tuple[float, float]:
    """The least setting between ``low`` and ``high`` whose value reaches ``level``, and that value.

    By bisection of the logarithm, for values that grow with the setting; what is returned was tried and reaches it.

    Raises:
        InputError: not even ``high`` reaches it.
    """
    reached = value(high)
    if not reached >= level:
        raise InputError(f"{reached:.3f} at {high:g} is the largest value, and {level:g} is asked for")
    if (lowest := value(low)) >= level:
        return low, lowest
    for _ in range(steps):
        middle = float(f"{math.sqrt(low * high):.{DIGITS}g}")
        if not low < middle < high:
            break
        found = value(middle)
        if found >= level:
            high, reached = middle, found
        else:
            low = middle
    return high, reached
