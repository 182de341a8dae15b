"""A data set: three disjoint parts, drawn from a seed, and a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ..errors import InputError
from ..random_streams import derive, generator
from .pictures import Resize

Item: TypeAlias = tuple[Tensor, int]
"""An image, float32 ``[C, H, W]`` in [0, 1] (or a table's row, float32 ``[D]``), and its class."""


class Samples(Protocol):
    """A map-style data set: a known number of inputs with their classes."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """One input and its class."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set in three disjoint parts, each a map-style data set of ``(x, label int)``.

    ``x`` is an image, float32 ``[C, H, W]`` in [0, 1], or a table's row, float32 ``[D]`` in the data's own units.

    Args:
        name: what reports call it.
        classes: names of the classes, in the order of the labels.
        shape: ``(C, H, W)`` of an image, ``(D,)`` of a row.
        train: trains the model.
        defense: trains defenses and calibrates detectors.
        test: judges. The official test part where there is one.
        digest: SHA-256, as hex, of content and split; empty: recipes make one of all labels and of some inputs.
        features: names of the ``D`` columns of a table; empty for images.
        resize: how images of other sizes were brought to ``shape``.

    Raises:
        InputError: for a table whose columns are not all named, each by a name of its own.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    train: Samples
    defense: Samples
    test: Samples
    digest: str
    features: tuple[str, ...] = ()
    resize: Resize = "squash"

    def __post_init__(self) -> None:
        columns = self.shape[0] if len(self.shape) == 1 else 0
        if len(self.features) != columns or len(set(self.features)) != columns:
            raise InputError(
                f"{self.name}: features must hold a name of its own for each column of a table, {columns} for items of "
                f"shape {self.shape}, got {len(self.features)}: {self.features!r}"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)


PARTS = ("train", "defense", "test")
"""Parts of a data set, in this order everywhere."""


@dataclass(frozen=True)
class Splits:
    """Which samples belong to which part: sorted, disjoint indices."""

    train: tuple[int, ...]
    defense: tuple[int, ...]
    test: tuple[int, ...]

    @classmethod
    def stratified(cls, labels: Sequence[int], fractions: Sequence[float], seed: int) -> Splits:
        """Parts of exact sizes in which each class has its share, up to a sample.

        Args:
            labels: the class of each sample.
            fractions: shares of train, defense and test; they sum to 1.
            seed: decides who goes where.
        """
        fractions = checked_fractions(fractions)
        positions = torch.empty(len(labels), dtype=torch.float64)
        for rows in _by_class(labels):
            rng = generator(seed, "split", labels[rows[0]])
            ranks = torch.randperm(len(rows), generator=rng) + torch.rand((), generator=rng, dtype=torch.float64)
            # A class's samples lie evenly over [0, 1]; the random offset is fair to classes of very few samples.
            positions[rows] = ranks / len(rows)
        order = positions.argsort(stable=True).tolist()
        first, second = _cuts(len(labels), fractions)
        return cls(tuple(sorted(order[:first])), tuple(sorted(order[first:second])), tuple(sorted(order[second:])))

    @classmethod
    def hashed(cls, names: Sequence[str], fractions: Sequence[float], seed: int) -> Splits:
        """Parts by a hash of each sample's name: a sample stays in its part when others come or go.

        Args:
            names: a name a sample, such as its file's.
            fractions: expected shares of train, defense and test; they sum to 1.
            seed: decides who goes where.
        """
        fractions = checked_fractions(fractions)
        parts: tuple[list[int], list[int], list[int]] = ([], [], [])
        for index, name in enumerate(names):
            position = derive(seed, "split", name) / 2**63
            part = 0 if position < fractions[0] else 1 if position < 1 - fractions[2] else 2
            parts[part].append(index)
        return cls(*(tuple(part) for part in parts))

    @classmethod
    def named(cls, parts: Sequence[str | None]) -> Splits:
        """Parts as they are named, one of ``PARTS`` a sample."""
        return cls(*(tuple(i for i, part in enumerate(parts) if part == name) for name in PARTS))

    def of(self, dataset: Samples) -> tuple[Subset[Item], Subset[Item], Subset[Item]]:
        """The three parts of ``dataset``."""
        return subset(dataset, self.train), subset(dataset, self.defense), subset(dataset, self.test)


def checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Three shares of train, defense and test that sum to 1.

    Raises:
        InputError: with the offending value.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(f"fractions must be three shares (train, defense, test) that sum to 1, got {fractions!r}")
    train, defense, test = fractions
    return float(train), float(defense), float(test)


def _cuts(size: int, fractions: Sequence[float]) -> tuple[int, int]:
    return round(size * fractions[0]), round(size * (fractions[0] + fractions[1]))


def _by_class(labels: Sequence[int]) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        rows.setdefault(label, []).append(index)
    return [rows[label] for label in sorted(rows)]


def labels_of(dataset: Samples) -> list[int]:
    """The labels of a data set, without decoding images where the data set has a ``labels`` attribute."""
    if isinstance(dataset, Subset):
        inner = labels_of(cast(Samples, dataset.dataset))
        return [inner[i] for i in dataset.indices]
    known = dataset.tensors[1] if _is_tensors(dataset) else known_labels(dataset, "labels")
    if known is not None:
        return [int(label) for label in known]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def has_labels(dataset: Samples) -> bool:
    """Whether :func:`labels_of` decodes no images."""
    if isinstance(dataset, Subset):
        return has_labels(cast(Samples, dataset.dataset))
    return _is_tensors(dataset) or known_labels(dataset, "labels") is not None


def known_labels(dataset: object, name: str) -> Sequence[int] | None:
    """The labels that a data set keeps under a name, if they are those that its items have."""
    # What a target_transform makes of them, as torchvision's data sets take one, the items alone say.
    if getattr(dataset, "target_transform", None) is not None:
        return None
    found = getattr(dataset, name, None)
    return found if found is not None and _are_labels(found, dataset) else None


def _are_labels(found: object, dataset: object) -> bool:
    """Whether an attribute holds a whole number for each sample, and not the names of the classes, say."""
    if isinstance(found, Tensor):
        whole = found.dim() == 1 and not found.is_floating_point() and not found.is_complex()
    elif isinstance(found, np.ndarray):
        whole = found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
    else:
        whole = isinstance(found, Sequence) and all(isinstance(label, (int, np.integer)) for label in found)
    return whole and len(found) == len(dataset)  # type: ignore[arg-type]


def _is_tensors(dataset: object) -> TypeGuard[TensorDataset]:
    """Inputs and labels as two tensors; a subclass may give other samples than it holds."""
    return type(dataset) is TensorDataset and len(dataset.tensors) == 2


def subset(dataset: Samples, indices: Sequence[int]) -> Subset[Item]:
    """Some of the samples, in this order."""
    # torch's Subset needs no more than ``Samples`` promises, and is annotated with torch's own class.
    return Subset(cast(Dataset[Item], dataset), indices)


def take(dataset: Samples, n: int, seed: int = 0) -> Subset[Item]:
    """``n`` samples, as many of each class as there are, in an order that mixes the classes.

    The same seed gives the same samples, and a larger ``n`` only adds to them.

    Raises:
        InputError: if the data set has fewer than ``n`` samples.
    """
    if not 0 <= n <= len(dataset):
        raise InputError(f"cannot take {n} samples of a data set of {len(dataset)}")
    order: list[tuple[int, float, int]] = []
    labels = labels_of(dataset)
    for rows in _by_class(labels):
        rng = generator(seed, "take", labels[rows[0]])
        ranks = torch.randperm(len(rows), generator=rng).tolist()
        ties = torch.rand(len(rows), generator=rng, dtype=torch.float32).tolist()
        order += zip(ranks, ties, rows, strict=True)
    return subset(dataset, [index for _, _, index in sorted(order)[:n]])


def stack(dataset: Samples, indices: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
    """Samples as tensors: ``x`` float32 ``[N, C, H, W]`` (``[N, D]`` for rows), ``y`` int64 ``[N]``.

    Args:
        dataset: one of the parts of a :class:`Data`, or a subset.
        indices: which samples, in this order; default all.

    Raises:
        InputError: if there are none, or inputs of several shapes.
    """
    rows = range(len(dataset)) if indices is None else indices
    items = [dataset[int(i)] for i in rows]
    if not items:
        raise InputError("nothing to stack: the data set, or the choice of indices, is empty")
    shapes = list(dict.fromkeys(tuple(x.shape) for x, _ in items))
    if len(shapes) > 1:
        raise InputError(f"samples must be of one shape, got {list(shapes[0])} and {list(shapes[1])}: resize them")
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items], dtype=torch.int64)


class Digest:
    """A SHA-256 over parts of any kind, each with its length, so that different parts give different digests."""

    def __init__(self, *words: object) -> None:
        self._hash = hashlib.sha256()
        self.add(*words)

    def add(self, *words: object) -> Digest:
        """Add words (their text) or tensors (their bytes and shape)."""
        for word in words:
            if isinstance(word, Tensor):
                self._bytes(repr((word.dtype, list(word.shape))).encode())
                self._bytes(word.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                self._bytes(repr(word).encode())
        return self

    def hex(self) -> str:
        """The digest so far."""
        return self._hash.hexdigest()

    def _bytes(self, content: bytes) -> None:
        self._hash.update(len(content).to_bytes(8, "big"))
        self._hash.update(content)


def checked_labels(labels: Sequence[int], num_classes: int, source: str) -> None:
    """Refuse labels outside ``[0, num_classes)``.

    Raises:
        InputError: naming ``source``, the label and where it stands.
    """
    for index, label in enumerate(labels):
        if not 0 <= label < num_classes:
            expected = f"0 to {num_classes - 1}"
            raise InputError(f"{source}: sample {index} has label {label}, but the classes are {expected}")


def one_of(component: Any, field: str, allowed: Sequence[object]) -> None:
    """Refuse a component's field whose value is not one of ``allowed``.

    Raises:
        InputError: naming the field, the value and what is allowed.
    """
    value = getattr(component, field)
    if value not in allowed:
        raise InputError(f"{type(component).__name__}.{field} must be one of {list(allowed)}, got {value!r}")
