"""Trigger inversion: the smallest patch that makes a model do something (Wang et al. 2019, Neural Cleanse)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustexplain.random_streams import generator

Aim = Callable[[Tensor], tuple[Tensor, bool]]
"""From triggered inputs to a loss that falls as the trigger works, and whether it works."""

COST = 1e-3
PATIENCE = 5
UP, DOWN = 1.5, 1.5**1.5
"""First weight of the mask's size above 0, steps before it changes, and by what factors (the authors' code)."""


@dataclass(frozen=True)
class Inverted:
    """The smallest trigger that worked.

    Args:
        mask: ``[H, W]`` in ``[0, 1]``.
        pattern: ``[C, H, W]`` in ``[0, 1]``.
        worked: whether any did; otherwise this is the last one tried.
    """

    mask: Tensor
    pattern: Tensor
    worked: bool

    @property
    def size(self) -> float:
        """Share of the image that the mask covers, in ``[0, 1]``; 1 where nothing worked."""
        return float(self.mask.mean()) if self.worked else 1.0

    def on(self, x: Tensor) -> Tensor:
        """``x`` with the trigger."""
        return x + self.mask * (self.pattern - x)


def invert(x: Tensor, aim: Aim, steps: int, seed: int, lr: float = 0.1) -> Inverted:
    """The trigger of the smallest mask (L1) that reaches ``aim`` on inputs ``x``, by Adam on mask and pattern.

    The weight of the mask's size grows while the trigger works and falls while it does not.

    Departure: that weight is 1e-3 from the first step on; in the authors' code it is 0 until the trigger has worked for
    some steps in a row.
    """
    draws = generator(seed, "trigger inversion")
    raw_mask, raw_pattern = (
        torch.empty(shape).uniform_(-1, 1, generator=draws).to(x).requires_grad_()
        for shape in (x.shape[2:], x.shape[1:])
    )
    search = torch.optim.Adam([raw_mask, raw_pattern], lr=lr, betas=(0.5, 0.9))
    best: Inverted | None = None
    cost, run = COST, 0
    for _ in range(steps):
        mask, pattern = (torch.tanh(raw) / 2 + 0.5 for raw in (raw_mask, raw_pattern))
        loss, works = aim(x + mask * (pattern - x))
        if works and (best is None or mask.mean() < best.mask.mean()):
            best = Inverted(mask.detach().clone(), pattern.detach().clone(), True)
        run = max(run, 0) + 1 if works else min(run, 0) - 1
        if abs(run) >= PATIENCE:
            cost, run = (cost * UP if run > 0 else cost / DOWN), 0
        gradients = torch.autograd.grad(loss + cost * mask.sum(), [raw_mask, raw_pattern])
        raw_mask.grad, raw_pattern.grad = gradients
        search.step()
    return best or Inverted(mask.detach(), pattern.detach(), False)
