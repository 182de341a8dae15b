"""Helpers of the attacks on tables: all rows of a data set, their standardisation, model outputs, audit views."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustexplain.data import stack
from robustexplain.door import answer, suited
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import Interpreter
from robustexplain.training import Samples

from .base import View


def table_rows(data: Samples) -> Tensor:
    """All rows of a table, ``[N, D]``.

    Raises:
        UnsupportedModelError: samples that are not table rows.
    """
    x, _ = stack(data)
    if x.dim() != 2:
        raise UnsupportedModelError(f"table rows [D] are needed, got samples {list(x.shape[1:])}")
    return x


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation of the columns of ``[N, D]``; a constant column gets 1."""
    exact = x.double()
    # Rounding gives a constant column a deviation that is not quite zero.
    std = torch.where(exact.amin(0) == exact.amax(0), 1.0, exact.std(0, correction=0))
    return exact.mean(0).float(), std.float()


def standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Rows ``[B, D]``, standardised, in float32: forests compare in float32, so a real row equals its own copy."""
    return (x.float() - mean) / std


@torch.no_grad()
def model_outputs(model: nn.Module, x: Tensor, chunk: int = 65536) -> Tensor:
    """Logits ``[N, K]`` on the CPU for rows ``[N, D]``, wherever the model is."""
    return torch.cat([answer(model, suited(model, part)).cpu() for part in x.split(chunk)])


@torch.no_grad()
def as_answered(honest: Interpreter, x: Tensor) -> dict[str, View]:
    """Rows ``[B, D]`` unchanged, with the honest model's predictions, which the manipulated model should keep."""
    answers = answer(honest.model, x).argmax(1)
    return {"as they are": View(x, answers, answers)}
