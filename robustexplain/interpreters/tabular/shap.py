"""KernelSHAP on tables: the authors' own package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import Kind
from ...door import answer
from ...errors import InputError
from ...fields import Count, Natural, check_fields
from ...random_streams import Streams
from ...registry import INTERPRETERS
from ...training import Samples, Session
from ..base import Explanation, Interpreter, explained_class
from ..reference import Reference
from .base import Output, checked_background, drawn_rows, output_function, package, restored_state, rows_of
from .focused import conditional_shap
from .generators import ConditionalRows, RowGenerator, checked_generator
from .guard import NeighbourGuard, classes_of, guarded_shap

Selection = Count | Literal["aic", "bic"] | None
"""How shap chooses the columns with a value: a number of them by LARS, an information criterion, or all."""


@dataclass(frozen=True, eq=False)
class SHAPTabular(Interpreter):
    """KernelSHAP of the shap package on table rows: Shapley values against a background (Lundberg and Lee 2017).

    The explainer is ``shap.KernelExplainer`` with the identity link: a column that is left out takes the values of the
    background's rows, by their weights (interventional). A map adds up to the explained class's output on the row
    minus its mean over the background. Values are exact where the package can evaluate every coalition of the columns
    that differ from the background, ``2^M - 2 <= samples``, and gives each a value: up to 10 columns by default, and
    11 with ``select=None``. Not differentiable.

    Args:
        background: rows ``[N, D]``, with weights as ``shap.kmeans`` gives them, or without.
        samples: coalitions evaluated for each row; ``None``: the package's ``2 M + 2048``.
        of: what is distributed: the ``probability`` of the class, whether it is predicted (``label``: 1 or 0, as in
            Slack et al.), or its ``logit``.
        select: the columns that may have a value, by the package's ``l1_reg``: a number of them (by LARS; its default
            is 10 for every table), ``aic`` or ``bic``, or ``None`` for all. The others get exactly 0.
        seed: of the coalitions; each explained row has its own random stream.
        batch_size: rows a forward pass, at most.
        guard: which rows of a coalition count; ``None``: all.
        generator: makes the rows whose values the left-out columns take, instead of the background (focused sampling);
            a map then adds up to the output minus its mean over these rows.

    Raises:
        MissingDataError: on the first input, without the shap package.
    """

    background: Reference = field()
    samples: Count | None = None
    of: Output = "probability"
    select: Selection = 10
    seed: Natural = 0
    batch_size: Count = 16384
    guard: NeighbourGuard | None = None
    generator: RowGenerator | None = None

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("tables",)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_background(self.background, type(self).__name__)
        if self.generator is not None:
            checked_generator(self.generator, self.background.x.shape[1], type(self).__name__)

    def _check(self, x: Tensor) -> None:
        self.background.like(x)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes, x = explained_class(logits, target).tolist(), x.detach()
        seeds = Streams.of(x, self.seed, "shap-tabular").integers(2**31).tolist()
        rows = x.double().cpu().numpy()
        with restored_state(x):
            if self.generator is None:
                values = self._against_background(x, rows, classes, seeds)
            else:
                codes = _Codes(self.generator.known()) if isinstance(self.generator, ConditionalRows) else None
                values = [
                    self._focused(self.generator, codes, x, row, label, seed)
                    for row, label, seed in zip(rows, classes, seeds, strict=True)
                ]
        return Explanation(logits, torch.from_numpy(np.stack(values)).to(x.device, x.dtype))

    def _against_background(
        self, x: Tensor, rows: np.ndarray, classes: list[int], seeds: list[int]
    ) -> list[np.ndarray]:
        background = rows_of(self.background)
        codes, shares = _Codes(background), self.background.shares().numpy()
        explainers = {c: self._explainer(codes, background, shares, x, c) for c in sorted(set(classes))}
        return [
            self._values(explainers[label], codes.of_row(row), seed)
            for row, label, seed in zip(rows, classes, seeds, strict=True)
        ]

    def _focused(
        self, generator: RowGenerator, codes: _Codes | None, x: Tensor, row: np.ndarray, label: int, seed: int
    ) -> np.ndarray:
        rng = np.random.default_rng(seed)
        nothing = np.zeros(len(row), dtype=bool)
        drawn = generator.given(row, nothing, generator.size, rng)
        codes = codes or _Codes(drawn)
        explainer = self._explainer(codes, drawn, np.full(len(drawn), 1 / len(drawn)), x, label)
        if isinstance(generator, ConditionalRows):
            conditional_shap(explainer, generator, row, codes.coded, rng)
        return self._values(explainer, codes.of_row(row), seed)

    def _explainer(self, codes: _Codes, rows: np.ndarray, shares: np.ndarray, x: Tensor, label: int) -> Any:
        shap = package("shap", type(self).__name__)
        legacy = package("shap.utils._legacy", type(self).__name__)
        names = [str(i) for i in range(rows.shape[1])]
        background = legacy.DenseData(codes.coded(rows), names, None, shares)
        outputs = output_function(self.model, x, self.of, self.batch_size)

        def class_output(rows: np.ndarray) -> np.ndarray:
            return outputs(codes.decoded(rows))[:, label]

        explainer = shap.KernelExplainer(class_output, background)
        if self.guard is not None:
            guarded_shap(explainer, self.guard, classes_of(outputs), codes.decoded)
        return explainer

    def _values(self, explainer: Any, row: np.ndarray, seed: int) -> np.ndarray:
        np.random.seed(seed)  # noqa: NPY002
        options = {"nsamples": "auto" if self.samples is None else self.samples, "l1_reg": _l1_reg(self.select)}
        return np.asarray(explainer.shap_values(row, silent=True, **options))


class _Codes:
    """Whole numbers for the values of each column, which keep apart what the package would take for equal.

    It leaves a column out whose values are close relative to their size (a time stamp), or tiny (1e-9 mol). It only
    exchanges values between rows, so that it can work on codes: even ones for the background's values, by rank, odd
    ones for a value of the explained row that the background does not have.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.values = [np.unique(column) for column in rows.T]
        self.row = rows[0]

    def coded(self, rows: np.ndarray) -> np.ndarray:
        """The codes of rows ``[n, D]`` of the background's values."""
        return np.stack([self._coded(i, column) for i, column in enumerate(rows.T)], 1)

    def of_row(self, row: np.ndarray) -> np.ndarray:
        """The codes of a row ``[D]``, whose values :meth:`decoded` uses from now on."""
        self.row = row
        return np.array([self._coded(i, row[i]) for i in range(len(row))])

    def decoded(self, codes: np.ndarray) -> np.ndarray:
        """Values ``[n, D]`` of codes."""
        columns = []
        for i, column in enumerate(codes.T.astype(np.int64)):
            known = self.values[i][np.clip(column // 2, 0, len(self.values[i]) - 1)]
            columns.append(np.where(column % 2 == 0, known, self.row[i]))
        return np.stack(columns, 1)

    def _coded(self, column: int, values: np.ndarray) -> np.ndarray:
        known = self.values[column]
        place = np.searchsorted(known, values)
        there = known[np.minimum(place, len(known) - 1)] == values
        return np.asarray(np.where(there, 2 * place, 2 * place - 1), dtype=np.float64)


def _l1_reg(select: Selection) -> str | bool:
    if select is None:
        return False
    return select if isinstance(select, str) else f"num_features({select})"


@dataclass(frozen=True)
class SHAPTabularTraining:
    """The settings of KernelSHAP on tables in a recipe; the background is drawn from the training data.

    Args:
        background: ``kmeans`` (``shap.kmeans`` of the standardised columns, as Slack et al. standardise their tables:
            centroids whose values are snapped to the nearest of their column, weighted by their clusters; always the
            same, whatever the seed), ``sample`` (rows drawn by the seed) or
            ``all`` rows.
        size: number of rows or centroids, at most that of the data; not used for ``all``.
        samples: coalitions evaluated for each row; ``None``: the package's.
        of: ``probability``, ``label`` or ``logit``.
        select: the columns that may have a value: a number of them, ``aic``, ``bic``, or ``None`` for all.
        batch_size: rows a forward pass, at most.
    """

    background: Literal["kmeans", "sample", "all"] = "kmeans"
    size: Count = 10
    samples: Count | None = None
    of: Output = "probability"
    select: Selection = 10
    batch_size: Count = 16384

    def __post_init__(self) -> None:
        check_fields(self)


def shap_background(data: Samples, how: str = "kmeans", size: int = 10, seed: int = 0) -> Reference:
    """A background of rows of the data or of their cluster centres.

    Args:
        data: map-style, gives ``(x, label)``, ``x`` ``[D]``.
        how: ``kmeans``, ``sample`` or ``all``.
        size: how many rows or centroids.
        seed: of a sample; ``shap.kmeans`` uses its own.

    Raises:
        InputError: an empty data set, one of images, or another ``how``.
        MissingDataError: ``kmeans`` without the shap package.
    """
    if how not in ("kmeans", "sample", "all"):
        raise InputError(f"a background is 'kmeans', 'sample' or 'all', got {how!r}")
    rows = drawn_rows(data, size if how == "sample" else None, seed)
    if how != "kmeans":
        return Reference(rows)
    shap = package("shap", "a background of k-means centroids")
    # Standardised: otherwise the column with the largest values would dominate the distances.
    exact = rows.double()
    std = exact.std(0, correction=0)
    scaled = (exact - exact.mean(0)) / torch.where(std > 0, std, 1.0)
    with restored_state(rows):
        # More clusters than distinct rows would leave some empty, on which the package fails.
        centroids = shap.kmeans(scaled.numpy(), min(size, len(rows.unique(dim=0))))
    weights = torch.from_numpy(np.asarray(centroids.weights, dtype=np.float64))
    # The package snaps each value to one of its column: find the row that it comes from.
    nearest = (scaled[None] - torch.from_numpy(centroids.data)[:, None]).abs().argmin(1)
    return Reference(rows.gather(0, nearest), weights=weights)


def draw_shap_background(
    model: nn.Module,
    data: Samples,
    settings: SHAPTabularTraining | None = None,
    *,
    seed: int = 0,
    session: Session | None = None,
    identity: object = None,
) -> SHAPTabular:
    """KernelSHAP with a background drawn from ``data``; nothing is fitted.

    Args:
        model: the classifier.
        data: map-style, gives ``(x, label)``, ``x`` ``[D]``.
        settings: of the background and of KernelSHAP.
        seed: of a sampled background and of the coalitions.
        session: not used; the signature is that of every trained interpreter.
        identity: not used.
    """
    s = settings or SHAPTabularTraining()
    background = shap_background(data, s.background, s.size, seed)
    return SHAPTabular(model, background, s.samples, s.of, s.select, seed, s.batch_size)


INTERPRETERS.register(
    "shap-tabular",
    paper="Lundberg and Lee 2017, theorem 2; the shap package",
    needs=("background", "tables", "shap"),
    settings=SHAPTabularTraining,
    train=draw_shap_background,
)(SHAPTabular)
