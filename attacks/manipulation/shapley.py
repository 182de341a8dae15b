"""Shapley values of one column for every pair of an explained row and a background row."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustexplain.random_streams import derive

from .tabular import model_outputs

Floats = NDArray[np.float64]


def pair_values(
    model: nn.Module, x: Tensor, z: Tensor, column: int, of_class: int, coalitions: int, seed: int, chunk: int = 65536
) -> Floats:
    """``phi_s(f, x_i, z_j)``, ``[n, m]``: the column's interventional Shapley value with one background row.

    ``phi_s = sum_S w(S) (f(x_{S+s}, z_rest) - f(x_S, z_rest))`` over coalitions ``S`` of the other columns, with
    ``w(S) = |S|! (D - |S| - 1)! / D!`` (Laberge et al. 2023, section 2). The mean over a background's rows is SHAP's
    value with that background: the value is linear in the background's weights.

    Args:
        model: takes ``[B, D]``, gives logits.
        x: explained rows ``[n, D]``.
        z: background rows ``[m, D]``.
        column: s.
        of_class: f is this class's probability.
        coalitions: how many are drawn, each with its complement, the same for all pairs. Where there are no more
            than that, all of them are used and the value is exact.
        seed: of the draws.
        chunk: rows in one pass of the model.
    """
    width = x.shape[1]
    taken, weights = coalition_table(width, column, coalitions, seed)
    found = np.zeros((len(x), len(z)))
    for i, row in enumerate(x):
        found[i] = _one(model, row, z, column, of_class, taken, weights, chunk)
    return found


def coalition_table(width: int, column: int, most: int, seed: int) -> tuple[Tensor, Floats]:
    """Coalitions of the columns other than ``column``, bool ``[c, D]``, and their weights, which add up to one."""
    others = [place for place in range(width) if place != column]
    free = len(others)
    if free < 63 and 2**free <= most:
        members = np.array(list(product((False, True), repeat=free)), dtype=bool).reshape(2**free, free)
        weights = np.array([1.0 / (width * comb(free, int(size))) for size in members.sum(1)])
    else:
        rng = np.random.default_rng(derive(seed, "coalitions"))
        half = max(1, (most + 1) // 2)
        # Sizes are uniform under the Shapley weights; strata of them lower the variance, the complements lower it
        # further.
        sizes = np.floor((rng.permutation(half) + rng.random(half)) / half * (free + 1)).astype(int)
        members = rng.random((half, free)).argsort(axis=1).argsort(axis=1) < sizes[:, None]
        members = np.concatenate([members, ~members])
        weights = np.full(len(members), 1.0 / len(members))
    taken = np.zeros((len(members), width), dtype=bool)
    taken[:, others] = members
    return torch.from_numpy(taken), weights


def _one(
    model: nn.Module, row: Tensor, z: Tensor, column: int, of_class: int, taken: Tensor, weights: Floats, chunk: int
) -> Floats:
    found = np.zeros(len(z))
    step = max(1, chunk // (2 * len(taken)))
    for start in range(0, len(z), step):
        part = z[start : start + step]
        without = torch.where(taken[:, None], row, part)  # [c, m, D]
        with_it = without.clone()
        with_it[..., column] = row[column]
        both = torch.stack([with_it, without]).flatten(0, 2)
        probs = (
            model_outputs(model, both, chunk).double().softmax(1)[:, of_class].view(2, len(taken), len(part)).numpy()
        )
        found[start : start + step] = weights @ (probs[0] - probs[1])
    return found
