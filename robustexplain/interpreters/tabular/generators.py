"""Made-up rows that look like those of the data: what LIME and KernelSHAP ask about in focused sampling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...errors import InputError
from ...fields import Count, check_fields
from ...models.skops_file import dumped, loaded
from ...registry import PARTS
from ..reference import Reference
from .auto_encoder import DropoutAutoEncoder, groups_of

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
PAPER = "Vres and Robnik-Sikonja 2022 and code"


class RowGenerator(ABC):
    """Draws made-up rows near given ones. A subclass is a frozen dataclass and implements ``around``."""

    size: int
    """Rows that KernelSHAP draws for each row that it explains; LIME draws as many as it takes samples."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The columns of a row."""

    @abstractmethod
    def around(self, rows: Floats, each: int, rng: np.random.Generator) -> Floats:
        """``each`` made-up rows near every one of ``rows`` ``[n, D]``, in the data's units: ``[n, each, D]``."""

    def given(self, row: Floats, known: Flags, number: int, rng: np.random.Generator) -> Floats:
        """``number`` rows ``[number, D]`` whose ``known`` columns ``[D]`` are like those of a row ``[D]``.

        By default those around the row, whatever is known.
        """
        return np.asarray(self.around(row[None], number, rng)[0])


class ConditionalRows(RowGenerator):
    """A generator that KernelSHAP asks anew for each coalition, by :meth:`RowGenerator.given`; it draws real rows."""

    @abstractmethod
    def known(self) -> Floats:
        """The rows ``[N, D]`` that it draws from."""


@PARTS.register("auto-encoder-rows", paper=PAPER)
@dataclass(frozen=True, eq=False)
class AutoEncoderRows(RowGenerator):
    """MCD-VAE: a row is encoded once and decoded many times with dropout on; keeps no row of the data.

    Args:
        network: the trained auto-encoder.
        size: rows that KernelSHAP draws for each row that it explains.
    """

    network: nn.Module
    size: Count = 100

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.network, DropoutAutoEncoder):
            raise InputError(f"the network must be a DropoutAutoEncoder, got {type(self.network).__name__}")

    @property
    def width(self) -> int:
        """The columns of a row."""
        return self._network.width

    def around(self, rows: Floats, each: int, rng: np.random.Generator) -> Floats:
        """The decoder's answers to the means of the rows' codes, each under another dropout."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        given = torch.from_numpy(np.ascontiguousarray(rows)).to(self._network.low)
        made = self._network.drawn(given, each, generator)
        return np.asarray(made.double().cpu().numpy())

    @property
    def _network(self) -> DropoutAutoEncoder:
        assert isinstance(self.network, DropoutAutoEncoder)  # checked before; for the type checker
        return self.network


@PARTS.register("random-trees")
@dataclass(frozen=True, eq=False)
class RandomTrees:
    """scikit-learn's totally random trees, stored by skops (no pickle, no code).

    Args:
        trees: a fitted ``RandomTreesEmbedding``.
    """

    trees: Any

    @classmethod
    def fit(cls, rows: Floats, trees: int, leaf: int, seed: int) -> RandomTrees:
        """Fit to ``[N, D]``: ``trees`` trees whose leaves hold ``leaf`` rows or more."""
        from sklearn.ensemble import RandomTreesEmbedding

        made = RandomTreesEmbedding(trees, max_depth=64, min_samples_leaf=leaf, random_state=seed % 2**32)
        return cls(made.fit(rows.astype(np.float32)))

    def leaves(self, rows: Floats) -> NDArray[np.int64]:
        """The node of each tree in which each row ends: ``[n, T]``."""
        given = np.ascontiguousarray(rows, dtype=np.float32)
        return np.stack([tree.apply(given) for tree in self.trees.estimators_], 1)

    def to_bytes(self) -> bytes:
        """skops' format."""
        return dumped(self.trees)

    @classmethod
    def from_bytes(cls, content: bytes) -> RandomTrees:
        """Read skops' format; refuses types that are not trusted and archives of excessive decompressed size."""
        trees = loaded(content)
        if not hasattr(trees, "estimators_"):
            raise InputError(f"the stored trees are a {type(trees).__name__}, which has none")
        return cls(trees)


class _Leaves(NamedTuple):
    """The rows of the data by tree and leaf: those of a leaf stand side by side."""

    order: NDArray[np.int64]
    """``[T, N]``, indices of rows."""
    start: NDArray[np.int64]
    """``[T, nodes]``, where a leaf's rows begin there."""
    size: NDArray[np.int64]
    """``[T, nodes]``, how many they are."""


@PARTS.register("tree-rows", paper=PAPER + "; Robnik-Sikonja 2016 (semiArtificial)")
@dataclass(frozen=True, eq=False)
class TreeRows(RowGenerator):
    """A tree ensemble: each value comes from a real row that shares a leaf of a random tree with the given row.

    A leaf of a totally random tree holds some columns close to the row's and leaves the others as they vary among real
    rows. Columns of one category (0 or 1, of sum 1) come from one row. Departures: the authors' ensemble (R package
    semiArtificial) is fitted to the label, and fills in the half of the values that it deletes first.

    Args:
        reference: real rows ``[N, D]``.
        trees: fitted to them.
        size: rows that KernelSHAP draws for each row that it explains.
    """

    reference: Reference
    trees: RandomTrees
    size: Count = 100

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.reference, Reference) or not isinstance(self.trees, RandomTrees):
            raise InputError("rows of trees need a Reference of real rows and RandomTrees fitted to them")

    @property
    def width(self) -> int:
        """The columns of a row."""
        return int(self.reference.x.shape[1])

    def around(self, rows: Floats, each: int, rng: np.random.Generator) -> Floats:
        """Values of the real rows in the leaves of the given ones."""
        real, groups, (order, start, size) = self._known
        leaves = self.trees.leaves(rows)
        tree = rng.integers(leaves.shape[1], size=(len(rows), each))
        leaf = np.take_along_axis(leaves, tree, 1)
        there, many = start[tree, leaf], size[tree, leaf]
        # One draw a group of columns.
        place = rng.random((len(rows), each, groups.max() + 1)) * many[:, :, None]
        chosen = order[tree[:, :, None], there[:, :, None] + place.astype(np.int64)]
        return np.asarray(real[chosen[:, :, groups], np.arange(real.shape[1])])

    @cached_property
    def _known(self) -> tuple[Floats, NDArray[np.int64], _Leaves]:
        real = self.reference.x.detach().cpu().double().numpy()
        leaves = self.trees.leaves(real)
        order = np.argsort(leaves, 0, kind="stable").T
        nodes = int(leaves.max()) + 1
        count = np.stack([np.bincount(column, minlength=nodes) for column in leaves.T])
        return real, groups_of(real), _Leaves(order, np.cumsum(count, 1) - count, count)


@PARTS.register("neighbour-rows", paper="Aas, Jullum and Loland 2021, section 3.3 (conditional values of SHAP)")
@dataclass(frozen=True, eq=False)
class NeighbourRows(ConditionalRows):
    """Real rows near the given one; in KernelSHAP, for each coalition, those nearest in its columns.

    KernelSHAP's values are then conditional ones: a column that the model does not use gets credit for what it tells of
    another. LIME asks about nothing but rows of the data and the explained one. Columns are standardised. Departure
    from Aas et al.: the nearest rows count alike, in Euclidean distance.

    Args:
        reference: real rows ``[N, D]``.
        nearest: LIME draws from so many rows next to the explained one; ``None``: from all.
        size: KernelSHAP takes so many rows for a coalition.
    """

    reference: Reference
    nearest: Count | None = None
    size: Count = 100

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.reference, Reference) or self.reference.x.dim() != 2:
            raise InputError("rows of neighbours need a Reference of real rows [N, D]")
        if max(self.size, self.nearest or 1) > len(self.reference.x):
            raise InputError(
                f"{max(self.size, self.nearest or 1)} neighbours need as many rows, got {len(self.reference.x)}"
            )

    @property
    def width(self) -> int:
        """The columns of a row."""
        return int(self.reference.x.shape[1])

    def around(self, rows: Floats, each: int, rng: np.random.Generator) -> Floats:
        """Draws, with replacement, from the neighbours of each row."""
        real = self._scaled[0]
        if self.nearest is None:
            return np.asarray(real[rng.integers(len(real), size=(len(rows), each))])
        known = np.ones(real.shape[1], dtype=bool)
        near = [self._next(row, known, self.nearest, rng) for row in rows]
        return np.stack([real[index[rng.integers(len(index), size=each)]] for index in near])

    def given(self, row: Floats, known: Flags, number: int, rng: np.random.Generator) -> Floats:
        """The rows nearest in the known columns; of those equally near, random ones."""
        return np.asarray(self._scaled[0][self._next(row, known, number, rng)])

    def known(self) -> Floats:
        """The real rows."""
        return self._scaled[0]

    def _next(self, row: Floats, known: Flags, number: int, rng: np.random.Generator) -> NDArray[np.int64]:
        real, std = self._scaled
        far = (((real[:, known] - row[known]) / std[known]) ** 2).sum(1) + 1e-9 * rng.random(len(real))
        return np.sort(np.argpartition(far, number - 1)[:number])

    @cached_property
    def _scaled(self) -> tuple[Floats, Floats]:
        real = self.reference.x.detach().cpu().double().numpy()
        return real, np.where(np.ptp(real, axis=0) == 0, 1.0, real.std(0))


def checked_generator(generator: object, width: int, who: str) -> None:
    """Refuse anything but a generator of rows of that width.

    Raises:
        InputError: with what was found.
    """
    if not isinstance(generator, RowGenerator):
        raise InputError(f"{who}.generator must be a RowGenerator, got {type(generator).__name__}")
    if generator.width != width:
        raise InputError(f"{who}.generator makes rows of {generator.width} columns, and the background has {width}")
