"""Focused sampling inside the packages: LIME and KernelSHAP ask about a generator's rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from .generators import ConditionalRows, Floats, RowGenerator


def focused_lime(explainer: Any, generator: RowGenerator) -> None:
    """Make a LIME explainer ask about a generator's rows near the explained one instead of independent columns."""

    def drawn(row: Floats, number: int) -> tuple[Floats, Floats]:
        rng = np.random.default_rng(explainer.random_state.randint(2**31))
        rows = np.concatenate([row[None], generator.around(row[None], number - 1, rng)[0]])
        if explainer.discretizer is not None:
            bins = explainer.discretizer.discretize(rows)
            return (bins == bins[:1]).astype(float), rows
        data = rows.copy()
        for column in explainer.categorical_features:
            data[:, column] = rows[:, column] == row[column]
        return data, rows

    explainer._LimeTabularExplainer__data_inverse = drawn


def conditional_shap(
    explainer: Any, generator: ConditionalRows, row: Floats, coded: Any, rng: np.random.Generator
) -> None:
    """Make a KernelSHAP explainer fill in each coalition with rows that are like the explained one in its columns.

    Args:
        explainer: of the package.
        generator: of the rows.
        row: the explained one, ``[D]`` in the data's units.
        coded: from rows ``[n, D]`` in those units to what the explainer works on.
        rng: of the rows.
    """
    added = explainer.addsample

    def looking_real(x: Floats, mask: Floats, weight: float) -> None:
        place = slice(explainer.nsamplesAdded * explainer.N, (explainer.nsamplesAdded + 1) * explainer.N)
        added(x, mask, weight)
        # Columns in which neither the row nor the background varies are known, too.
        known = np.ones(x.shape[1], dtype=bool)
        known[explainer.varyingFeatureGroups] = mask == 1
        missing = ~known
        drawn = coded(generator.given(row, known, explainer.N, rng))
        explainer.synth_data[place, missing] = drawn[:, missing]

    explainer.addsample = looking_real
