"""The user's own inputs as the data set of a matrix: all of them are the test part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import checks
from ..data import Data, Item, labels_of, load, stack, take
from ..data.base import Digest, checked_labels, known_labels
from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Inputs(Dataset[Item]):
    """Inputs with their labels in memory.

    Args:
        items: ``x`` ``[N, C, H, W]`` or ``[N, D]``, or a map-style data set of ``(x, label)``.
        labels: a class an input.
    """

    items: Any
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        found = self.items[index]
        return (found if isinstance(self.items, Tensor) else found[0]), self.labels[index]


def data_of(given: Any, count_classes: Callable[[Tensor], int]) -> Data:
    """A data set from the user's tensors, data set or name; ``digest`` is empty if the content was not read.

    Args:
        given: a :class:`robustexplain.data.Data`, the name of one, tensors ``(x, y)``, or a map-style data set of
            ``(x, label)``, ``x`` a float tensor.
        count_classes: how many classes the classifiers tell apart, given one input as a batch.

    Raises:
        InputError: none of these, nothing in it, or labels that the classifiers do not know.
    """
    if isinstance(given, Data):
        return given
    if isinstance(given, str):
        return load(given)
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        test, digest = _tensors(*given), Digest(given[0].cpu(), given[1].cpu()).hex()
    elif hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        test, digest = _samples(given), ""
    else:
        raise InputError(
            "data must be tensors (x, y), a map-style data set of (x, label), or a registered data set, got "
            f"{type(given).__name__}"
        )
    first = test[0][0]
    num_classes, shape = count_classes(first[None]), tuple(first.shape)
    checked_labels(test.labels, num_classes, "data")
    features = tuple(f"column {i}" for i in range(shape[0])) if len(shape) == 1 else ()
    nothing = Inputs((), ())
    classes = tuple(map(str, range(num_classes)))
    return Data("data", classes, shape, nothing, nothing, test, digest, features)


def content_digest(data: Data, positions: list[int]) -> str:
    """The digest of a data set without one: of all labels and of the inputs that are evaluated."""
    if data.digest:
        return data.digest
    digest = Digest(tuple(labels_of(data.test)), tuple(positions))
    for position in positions:
        digest.add(data.test[position][0].cpu())
    return digest.hex()


def pool_digest(data: Data, size: int, seed: int) -> str:
    """The digest of an adversary's own inputs, of the defense part, else of the train part."""
    x, y = adversarys_own(data, size, seed)
    return Digest(x.cpu(), y.cpu()).hex()


def adversarys_own(data: Data, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """An adversary's own inputs with their labels, at most ``size``: of the defense part, else of the train part."""
    part = data.defense if len(data.defense) else data.train
    return stack(take(part, min(len(part), size), seed))


def _tensors(x: Tensor, y: Tensor) -> Inputs:
    checks.inputs(x)
    if y.dtype.is_floating_point or y.dtype == torch.bool or y.shape != (len(x),):
        raise InputError(f"y must hold a class for each of {len(x)} inputs, got {y.dtype} {list(y.shape)}")
    return Inputs(x.detach(), tuple(y.tolist()))


def _samples(given: Any) -> Inputs:
    if not len(given):
        raise InputError("data is empty")
    item = given[0]
    if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Tensor)):
        got = f"a tensor {list(item.shape)}: labels are missing" if isinstance(item, Tensor) else f"{item!r:.80}"
        raise InputError(f"data must give (x, label) with x a tensor, got {got}")
    checks.inputs(item[0][None])
    # What torchvision's data sets have: labels without decoding the images.
    known = known_labels(given, "targets")
    return Inputs(given, tuple(map(int, labels_of(given) if known is None else known)))
