"""Imitations of the synthetic rows of LIME and KernelSHAP, on which Slack et al. 2020 train their detector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustexplain.interpreters.tabular.generators import ConditionalRows, RowGenerator

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


def lime_rows(z: Rows, spread: float, copies: int, rng: np.random.Generator) -> tuple[Rows, Labels]:
    """Each row ``copies`` times as it is (label 1) and as often with normal noise on every column (label 0).

    Args:
        z: standardised rows ``[N, D]``.
        spread: standard deviation of the noise, in those units.
        copies: noisy and clean copies of every row.
        rng: random generator of the noise.
    """
    real = np.tile(z, (copies, 1))
    made = real + rng.normal(0.0, spread, real.shape).astype(np.float32)
    return np.concatenate([real, made]), _labels(len(real), np.zeros(len(made), dtype=np.int64))


def shap_rows(
    z: Rows, background: Rows, draws: int, repeats: int, whole: bool, rng: np.random.Generator
) -> tuple[Rows, Labels]:
    """Each row ``repeats`` times (label 1) and ``draws`` rows of which some columns come from the background (label 0).

    A synthetic row that equals a real one is labelled real.

    Args:
        z: rows ``[N, D]``.
        background: rows ``[M, D]``.
        draws: how many synthetic rows.
        repeats: copies of every real row.
        whole: replace columns as KernelSHAP does: all from one background row, their number drawn by the Shapley
            kernel. Otherwise D draws with replacement decide which columns are replaced, each from another background
            row.
        rng: random generator of the draws.
    """
    made = z[rng.integers(len(z), size=draws)]
    width = z.shape[1]
    if whole:
        replaced = _coalitions(draws, width, rng)
        sources = np.repeat(rng.integers(len(background), size=(draws, 1)), width, axis=1)
    else:
        replaced = np.zeros(made.shape, dtype=bool)
        replaced[np.arange(draws)[:, None], rng.integers(width, size=made.shape)] = True
        sources = rng.integers(len(background), size=made.shape)
    return beside_real(z, np.where(replaced, background[sources, np.arange(width)], made), repeats)


def focused_rows(x: Rows, generator: RowGenerator, draws: int, coalitions: bool, rng: np.random.Generator) -> Rows:
    """``draws`` rows that focused sampling asks about, ``[draws, D]`` in the data's units.

    Args:
        x: rows that are explained, ``[N, D]`` in the data's units; each as often as another.
        generator: of the rows.
        draws: how many rows.
        coalitions: of KernelSHAP, where some columns are the explained row's, their number drawn by the Shapley kernel;
            otherwise of LIME.
        rng: random generator of the draws.
    """
    rows = np.resize(rng.permutation(x), (draws, x.shape[1])).astype(np.float64)
    if not coalitions:
        return generator.around(rows, 1, rng)[:, 0].astype(np.float32)
    replaced = _coalitions(draws, x.shape[1], rng)
    if isinstance(generator, ConditionalRows):
        # One of those that the explainer takes: the very nearest of a row of the data is that row.
        place = rng.integers(generator.size, size=draws)
        near = (generator.given(row, ~r, generator.size, rng) for row, r in zip(rows, replaced, strict=True))
        made = np.stack([found[i] for found, i in zip(near, place, strict=True)])
    else:
        made = generator.around(rows, 1, rng)[:, 0]
    return np.where(replaced, made, rows).astype(np.float32)


def beside_real(z: Rows, made: Rows, repeats: int) -> tuple[Rows, Labels]:
    """Each real row ``repeats`` times (label 1), then the made-up ones: 1 where they equal a real row, else 0."""
    known = {row.tobytes() for row in np.ascontiguousarray(z + 0.0)}
    same = np.fromiter((row.tobytes() in known for row in np.ascontiguousarray(made + 0.0)), dtype=np.int64)
    return np.concatenate([np.repeat(z, repeats, axis=0), made]), _labels(len(z) * repeats, same)


def _labels(real: int, made: Labels) -> Labels:
    return np.concatenate([np.ones(real, dtype=np.int64), made])


def _coalitions(draws: int, width: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    if width < 2:
        return np.ones((draws, width), dtype=bool)
    sizes = np.arange(1, width)
    weights = 1.0 / (sizes * (width - sizes))  # the kernel's weight times the number of coalitions of that size
    chosen = rng.choice(sizes, size=draws, p=weights / weights.sum())
    order = rng.random((draws, width)).argsort(axis=1)
    taken: NDArray[np.bool_] = order < chosen[:, None]
    return taken
