"""LIME on tables: the authors' own package."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import Kind
from ...door import answer
from ...errors import InputError
from ...features import Feature, index_of
from ...fields import Count, Natural, Positive, check_fields
from ...random_streams import Streams
from ...registry import INTERPRETERS
from ...training import Samples, Session
from ..base import Explanation, Interpreter, explained_class
from ..reference import Reference
from .base import checked_background, drawn_rows, output_function, package, restored_state, rows_of
from .focused import focused_lime
from .generators import RowGenerator, checked_generator
from .guard import NeighbourGuard, classes_of, guarded_lime


@dataclass(frozen=True, eq=False)
class LIMETabular(Interpreter):
    """LIME of the lime package on table rows: weights of a local ridge regression on random rows (Ribeiro et al. 2016).

    The explainer is ``lime.lime_tabular.LimeTabularExplainer`` with its own kernel, regression and sampling. A map
    holds the weights of all columns for the explained class: a numeric column's is per standard deviation of the
    background, a category's (and, with ``discretize``, every column's) that of "as in this row" against any other
    value. Departures: all columns stay in the regression (the package names the best ten), and rows are sampled around
    the one explained, where the package samples around the mean of the background by default. Not differentiable.

    Args:
        background: rows ``[N, D]`` that the package takes means, deviations and frequencies from; no weights.
        samples: random rows evaluated for each row that is explained.
        kernel_width: of the kernel on standardised distances; ``None``: the package's ``0.75 sqrt(D)``.
        discretize: cut numeric columns at their quartiles.
        sample_around_instance: draw numeric columns around the explained row instead of the mean.
        categorical: columns that are categories: drawn by their frequencies in the background.
        of: what is regressed: the ``probability`` of the class, or whether it is predicted (``label``: 1 or 0).
        seed: of the random rows; each explained row has its own random stream.
        batch_size: rows a forward pass, at most.
        guard: which of the random rows are kept; ``None``: all.
        generator: makes the random rows instead of the package (focused sampling).

    Raises:
        MissingDataError: on the first input, without the lime package.
    """

    background: Reference = field()
    samples: Count = 5000
    kernel_width: Positive | None = None
    discretize: bool = False
    sample_around_instance: bool = True
    categorical: tuple[Feature, ...] = ()
    of: Literal["probability", "label"] = "probability"
    seed: Natural = 0
    batch_size: Count = 16384
    guard: NeighbourGuard | None = None
    generator: RowGenerator | None = None

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("tables",)
    explains_scalars: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("categorical",)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_background(self.background, type(self).__name__)
        if self.background.weights is not None:
            raise InputError("LIME takes means and frequencies of plain rows: its background has no weights")
        width = self.background.x.shape[1]
        if self.generator is not None:
            checked_generator(self.generator, width, type(self).__name__)
        object.__setattr__(self, "categorical", tuple(index_of(c, width=width) for c in self.categorical))

    def _check(self, x: Tensor) -> None:
        self.background.like(x)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        rows = rows_of(self.background)
        logits = answer(self.model, x)
        classes, x = explained_class(logits, target).tolist(), x.detach()
        seeds = Streams.of(x, self.seed, "lime-tabular").integers(2**31).tolist()
        function = output_function(self.model, x, self.of, self.batch_size)
        with restored_state(x):
            explainer = self._explainer(rows)
            if self.generator is not None:
                focused_lime(explainer, self.generator)
            if self.guard is not None:
                guarded_lime(explainer, self.guard, classes_of(function))
            weights = [
                self._weights(explainer, row, function, label, seed)
                for row, label, seed in zip(x.double().cpu().numpy(), classes, seeds, strict=True)
            ]
        return Explanation(logits, torch.from_numpy(np.stack(weights)).to(x.device, x.dtype))

    def _explainer(self, rows: np.ndarray) -> Any:
        # A guard asks the model of these very inputs, on their device and in their dtype.
        if "explainer" not in self._cache or self.guard is not None:
            lime = package("lime.lime_tabular", type(self).__name__)
            self._cache["explainer"] = lime.LimeTabularExplainer(
                rows,
                categorical_features=list(self.categorical),
                kernel_width=self.kernel_width,
                feature_selection="none",
                discretize_continuous=self.discretize,
                sample_around_instance=self.sample_around_instance,
                random_state=0,
            )
        return self._cache["explainer"]

    @cached_property
    def _cache(self) -> dict[str, Any]:
        return {}

    def _weights(self, explainer: Any, row: np.ndarray, function: Any, label: int, seed: int) -> np.ndarray:
        # The package shares one state between explainer, regression and discretizer; it is reset for each row.
        state = np.random.RandomState(seed)
        for part in (explainer, explainer.base, explainer.discretizer):
            if part is not None:
                part.random_state = state
        explanation = explainer.explain_instance(
            row, function, (label,), num_features=len(row), num_samples=self.samples
        )
        weights = np.zeros(len(row))
        for column, weight in explanation.local_exp[label]:
            weights[column] = weight
        return weights


@dataclass(frozen=True)
class LIMETabularTraining:
    """The settings of LIME on tables in a recipe; the background is drawn from the training data.

    Args:
        size: how many rows the background holds; ``None``: all.
        samples: random rows evaluated for each row that is explained.
        kernel_width: of the kernel; ``None``: the package's.
        discretize: cut numeric columns at their quartiles.
        sample_around_instance: draw around the explained row instead of the mean.
        categorical: columns that are categories, by place or name.
        of: ``probability`` or ``label``.
        batch_size: rows a forward pass, at most.
    """

    size: Count | None = None
    samples: Count = 5000
    kernel_width: Positive | None = None
    discretize: bool = False
    sample_around_instance: bool = True
    categorical: tuple[Feature, ...] = ()
    of: Literal["probability", "label"] = "probability"
    batch_size: Count = 16384

    columns: ClassVar[tuple[str, ...]] = ("categorical",)

    def __post_init__(self) -> None:
        check_fields(self)


def draw_lime_background(
    model: nn.Module,
    data: Samples,
    settings: LIMETabularTraining | None = None,
    *,
    seed: int = 0,
    session: Session | None = None,
    identity: object = None,
) -> LIMETabular:
    """LIME with a background of rows of ``data``; nothing is fitted.

    Args:
        model: the classifier.
        data: map-style, gives ``(x, label)``, ``x`` ``[D]``.
        settings: of the background and of LIME; columns by index.
        seed: of the background and of LIME.
        session: not used; the signature is that of every trained interpreter.
        identity: not used.
    """
    s = settings or LIMETabularTraining()
    background = Reference(drawn_rows(data, s.size, seed))
    return LIMETabular(model, background, s.samples, s.kernel_width, s.discretize, s.sample_around_instance,
                       s.categorical, s.of, seed, s.batch_size)  # fmt: skip


INTERPRETERS.register(
    "lime-tabular",
    paper="Ribeiro et al. 2016; the lime package",
    needs=("background", "tables", "lime"),
    settings=LIMETabularTraining,
    train=draw_lime_background,
)(LIMETabular)
