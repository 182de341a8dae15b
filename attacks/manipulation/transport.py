"""Biased sampling weights that are as close to uniform as possible in optimal-transport distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustexplain.errors import InputError

Floats = NDArray[np.float64]
Cells = NDArray[np.int64]


def biased_weights(coefficients: Floats, outputs: Floats, distance_weight: float) -> Floats:
    """Weights ``p`` that minimise ``sum_j c_j p_j + lambda * W1(p, uniform)`` (Laberge et al. 2023, the flow problem).

    ``W1`` is taken between the model's outputs, which are all that the auditor sees. The published code solves a
    min-cost flow. Since no row's weight is bounded, the rows separate: each row ``i`` gives its share ``1 / N`` to the
    row ``j`` of least ``c_j + lambda * |f_j - f_i|``, which is the exact optimum. A row that is among the best itself
    keeps its share.

    Args:
        coefficients: ``c`` ``[N]``: each row's contribution to the amplitude, which is minimised.
        outputs: ``f`` ``[N]``.
        distance_weight: ``lambda``; 0 puts all weight on the least coefficient, infinity gives the uniform
            distribution.

    Returns:
        ``p`` ``[N]``, at least 0, of sum 1.
    """
    count = len(coefficients)
    shares = np.zeros(count)
    for start in range(0, count, 512):
        part = slice(start, min(start + 512, count))
        cost = coefficients[None] + distance_weight * np.abs(outputs[part, None] - outputs[None])
        unmoved, best = coefficients[part], cost.argmin(1)
        least = cost[np.arange(len(best)), best]
        chosen = np.where(unmoved <= least + 1e-12 * np.abs(least), np.arange(part.start, part.stop), best)
        np.add.at(shares, chosen, 1.0 / count)
    return shares


def quota_weights(rows: Floats, cells: Cells, shares: Sequence[float], most: float) -> Floats:
    """Weights of least transport cost whose cells have given shares (Fukuchi et al. 2020, eq. 5 and 6).

    Minimises ``sum_ij C_ij pi_ij``, ``C`` the squared Euclidean distance, over couplings of ``p`` with the uniform
    distribution on all rows, under ``sum_{i in c} p_i = a_c`` and ``p_i <= most``. A linear program of ``N^2``
    variables, solved by HiGHS; the published code solves the same as a min-cost flow.

    Args:
        rows: ``[N, D]``, in the units that distances are taken in.
        cells: the cell of each row, ``[N]``, 0 to C - 1.
        shares: ``a_c``, of sum 1.
        most: largest weight of a row; ``1 / K`` if ``K`` rows are drawn without replacement.

    Returns:
        ``p`` ``[N]``, of sum 1.

    Raises:
        InputError: a share that exceeds the largest total weight of its cell.
    """
    from scipy.optimize import linprog  # type: ignore[import-untyped]

    count = len(rows)
    for cell, (share, there) in enumerate(zip(shares, np.bincount(cells, minlength=len(shares)), strict=True)):
        if not 0 <= share <= most * there + 1e-9:
            raise InputError(f"cell {cell} should have a share of {share:.4g}, but its {there} rows have at most "
                             f"{most * there:.4g}")  # fmt: skip
    # In units of 1 / N, so that the solver's absolute tolerances mean the same for every N.
    bounds: Any = [(0, None)] * (count * count) + [(0, count * most)] * count
    found = linprog(
        np.concatenate([squared_distances(rows).ravel(), np.zeros(count)]),
        A_eq=_equations(count, cells, len(shares)),
        b_eq=np.concatenate([np.ones(count), np.zeros(count), np.array(shares) * count]),
        bounds=bounds,
        method="highs",
    )
    if not found.success:
        raise InputError(f"no weights have the shares {list(shares)}: {found.message}")
    weights = np.clip(found.x[count * count :], 0, None)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def squared_distances(rows: Floats) -> Floats:
    """``[N, N]``: squared Euclidean distances of rows ``[N, D]``."""
    squares = (rows**2).sum(1)
    return np.asarray(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0.0), dtype=np.float64)


def draw_quota(weights: Floats, cells: Cells, quota: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Sorted row indices: the exact quota of each cell, without replacement, probabilities proportional to weights.

    Systematic sampling in a random order within each cell; a row whose probability would exceed 1 is always drawn.

    Args:
        weights: ``[N]``, at least 0.
        cells: the cell of each row, ``[N]``.
        quota: rows of each cell, at most as many as it has.
        rng: random generator of the draws.
    """
    chosen: list[int] = []
    for cell, wanted in enumerate(quota):
        members = rng.permutation(np.flatnonzero(cells == cell))
        if wanted:
            reach = np.cumsum(_inclusion(weights[members], wanted))
            marks = np.arange(wanted) + rng.random()
            chosen += members[np.searchsorted(reach, marks, side="right").clip(max=len(members) - 1)].tolist()
    return sorted(chosen)


def _inclusion(weights: Floats, wanted: int) -> Floats:
    # Rows of weight zero stay possible: otherwise a cell with too few others could not fill its quota.
    shares = weights + 1e-9 * max(float(weights.sum()), 1.0) / len(weights)
    certain = np.zeros(len(weights), dtype=bool)
    while True:
        left = wanted - int(certain.sum())
        found = np.where(certain, 1.0, shares * left / max(float(shares[~certain].sum()), 1e-300))
        if not (found > 1 + 1e-12).any():
            return found
        certain |= found >= 1


def _equations(count: int, cells: Cells, number: int) -> Any:
    from scipy import sparse  # type: ignore[import-untyped]

    one = sparse.eye(count, format="csr")
    ones = np.ones((1, count))
    arriving = sparse.hstack([sparse.kron(ones, one), sparse.csr_matrix((count, count))])
    leaving = sparse.hstack([sparse.kron(one, ones), -one])
    members = sparse.csr_matrix((np.ones(count), (cells, np.arange(count))), shape=(number, count))
    shares = sparse.hstack([sparse.csr_matrix((number, count * count)), members])
    return sparse.vstack([arriving, leaving, shares]).tocsr()
