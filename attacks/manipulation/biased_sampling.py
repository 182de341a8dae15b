"""A biased reference sample, close to the data, on which an unfair model looks fair (Fukuchi et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.features import Feature, index_of
from robustexplain.fields import Count, Fraction, Natural
from robustexplain.interpreters import Interpreter
from robustexplain.random_streams import derive
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from .base import Manipulation, View
from .fool_shap import checked_interpreter, with_background
from .tabular import as_answered, model_outputs, standardisation, standardised, table_rows
from .transport import draw_quota, quota_weights

Floats = NDArray[np.float64]
Cells = NDArray[np.int64]


class Sampled(NamedTuple):
    """The reference sample, with the quota and the weights by which it was drawn."""

    rows: Tensor
    """``[size, D]``, in the order of the data, none twice."""
    quota: tuple[int, int, int, int]
    """Rows of each cell: the lower group refused and accepted, the upper group refused and accepted."""
    weights: Floats
    """``p`` ``[N]``: sampling weights of all rows, of sum 1."""


@MANIPULATIONS.register("stealthily-biased-sampling", paper="Fukuchi et al. 2020, section 4", needs=("data", "tabular"))
@dataclass(frozen=True)
class StealthilyBiasedSampling(Manipulation):
    """Draws a reference sample close to the data in which both groups have the same rate of acceptance.

    The rows fall in four cells, sensitive group by the model's decision. In the sample each group has its share of the
    data and is accepted at ``rate``. Under these quotas the rows' weights are those of least transport cost to the
    uniform distribution (:func:`quota_weights`), on standardised columns. Departures: the published code averages
    the weights of random subsets of rows; here the subsets are a random partition with the cells in proportion, so
    that every row has a weight; the sample meets the quotas exactly and contains no row twice.

    Args:
        sensitive: the column that divides the groups.
        threshold: rows above it are the upper group; default: the column's mean.
        accepted: the class that is a favourable decision.
        rate: share of each group that is accepted in the sample; default: the model's rate over all rows.
        size: ``K``, rows of the sample.
        subset: rows of one linear program, whose time grows at least with their cube.
        rounds: number of random partitions over which weights are averaged.
        seed: of partitions and draws.

    Raises:
        InputError: a column that does not divide the rows in two groups, a cell with fewer rows than its quota.
        UnsupportedModelError: an interpreter without a background.
    """

    sensitive: Feature = field(kw_only=True)
    threshold: float | None = None
    accepted: Natural = 1
    rate: Fraction | None = None
    size: Count = 200
    subset: Count = 150
    rounds: Count = 1

    changes: ClassVar[str] = "background"
    attacks: ClassVar[tuple[str, ...]] = ("shap-tabular", "lime-tabular", "expected-gradients")
    columns: ClassVar[tuple[str, ...]] = ("sensitive",)

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # checked before; for the type checker
        checked_interpreter(system)
        return with_background(system, self.choose(system, data).rows)

    def choose(self, system: System, data: Samples) -> Sampled:
        """The sample, with quota and weights.

        Args:
            system: its decisions should look fair.
            data: gives ``(x [D], label)``: the population.
        """
        x = table_rows(data)
        cells = self._cells(system, x)
        quota = self._quota(cells)
        weights = self._weights(x, cells, quota)
        rows = draw_quota(weights, cells, quota, np.random.default_rng(derive(self.seed, "sample")))
        return Sampled(x[rows], quota, weights)

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The rows unchanged, with the honest model's predictions."""
        return as_answered(honest, x)

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at, in a few words each, for tables."""
        return self.changes, f"groups of {self.sensitive} accepted alike"

    def _cells(self, system: System, x: Tensor) -> Cells:
        column = x[:, index_of(self.sensitive, width=x.shape[1])]
        above = column > (float(column.double().mean()) if self.threshold is None else self.threshold)
        decided = model_outputs(system.model, x).argmax(1) == self.accepted
        return np.asarray((2 * above.long() + decided.long()).numpy(), dtype=np.int64)

    def _quota(self, cells: Cells) -> tuple[int, int, int, int]:
        there = np.bincount(cells, minlength=4)
        if not there[:2].sum() or not there[2:].sum():
            raise InputError(f"column {self.sensitive!r} does not divide the rows in two groups")
        rate = float(there[[1, 3]].sum() / len(cells)) if self.rate is None else self.rate
        lower = round(self.size * float(there[:2].sum()) / len(cells))
        yes = round(lower * rate), round((self.size - lower) * rate)
        quota = lower - yes[0], yes[0], self.size - lower - yes[1], yes[1]
        names = ("lower group, refused", "lower group, accepted", "upper group, refused", "upper group, accepted")
        for name, wanted, count in zip(names, quota, there.tolist(), strict=True):
            if wanted > count:
                raise InputError(f"the sample needs {wanted} rows of the {name}, and the data has {count}: choose a "
                                 "smaller size or another rate")  # fmt: skip
        return quota

    def _weights(self, x: Tensor, cells: Cells, quota: tuple[int, ...]) -> Floats:
        rows = standardised(x, *standardisation(x)).double().numpy()
        rng = np.random.default_rng(derive(self.seed, "partition"))
        weights = np.zeros(len(x))
        for _ in range(self.rounds):
            for part in partition(cells, self.subset, rng):
                there = np.bincount(cells[part], minlength=4)
                shares = np.where(there > 0, np.array(quota) / self.size, 0.0)
                shares = shares / shares.sum()
                # A subset's cells are whole numbers of rows: a row may need slightly more weight than in the whole
                # data.
                most = max([len(x) / (self.size * len(part)), *(shares[there > 0] / there[there > 0])])
                weights[part] += quota_weights(rows[part], cells[part], shares.tolist(), float(most)) * len(part)
        return np.asarray(weights / weights.sum(), dtype=np.float64)


def partition(cells: Cells, size: int, rng: np.random.Generator) -> list[Cells]:
    """Random disjoint subsets of about ``size`` rows with the cells in proportion: sorted indices."""
    number = max(1, -(-len(cells) // size))
    order = np.concatenate([rng.permutation(np.flatnonzero(cells == cell)) for cell in np.unique(cells)])
    return [np.sort(order[start::number]) for start in range(number)]
