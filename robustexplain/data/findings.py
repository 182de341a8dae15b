"""What can be known about a data set before anything is trained on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import DataWarning, InputError
from .base import PARTS, Data, Splits, labels_of

_TRIED = 16
"""How many samples of each part are read."""


def findings(data: Data) -> list[str]:
    """A line for each mistake: files that cannot be read, samples that are not what the data set says.

    Of files all are known; of samples a few of each part are read, evenly over it.
    """
    lines = _faults(data)
    if lines:
        return lines
    for part in PARTS:
        samples = getattr(data, part)
        count = len(samples)
        for index in sorted({i * count // _TRIED for i in range(_TRIED)}) if count else []:
            where = f"{data.name}, sample {index} of the {part} part"
            try:
                lines += _wrong(samples[index], data, where)
            except InputError as error:
                lines.append(str(error))
    return lines[:8]


def _faults(data: Data) -> list[str]:
    """Files that cannot be read, by data sets that know them (their ``faults``, by name)."""
    known: dict[str, str] = {}
    for part in PARTS:
        found = getattr(getattr(getattr(data, part), "dataset", getattr(data, part)), "faults", None)
        known |= found if isinstance(found, Mapping) else {}
    lines = [known[name] for name in sorted(known)[:8]]
    return [*lines, f"and {len(known) - 8} more files of {data.name} cannot be read"] if len(known) > 8 else lines


def _wrong(item: object, data: Data, where: str) -> Iterable[str]:
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], Tensor):
        yield f"{where} must be (x, label) with x a tensor, got {item!r:.80}"
        return
    x, label = item
    if tuple(x.shape) != tuple(data.shape) or not x.is_floating_point():
        yield f"{where} must be floating point {list(data.shape)}, got {x.dtype} {list(x.shape)}"
    elif not torch.isfinite(x).all():
        yield f"{where} holds NaN or infinity"
    elif len(data.shape) == 3 and not (x.min() >= 0 and x.max() <= 1):
        yield f"{where} must lie in [0, 1], got values from {float(x.min()):.6g} to {float(x.max()):.6g}"
    if not 0 <= int(label) < data.num_classes:
        yield f"{where} has label {label}, but the classes are 0 to {data.num_classes - 1}"


def warn_of_classes(data: Data) -> None:
    """Warn of classes that are missing from a part, where the part is not empty.

    A class that no part has is named only if a part trains: a data set of a thousand classes may be judged on ten.
    """
    parts = {part: set(labels_of(getattr(data, part))) for part in PARTS if len(getattr(data, part))}
    seen: set[int] = set().union(*parts.values())
    lines = []
    if len(data.train) and len(seen) < data.num_classes:
        lines.append(f"no part has a sample of {_names(data, set(range(data.num_classes)) - seen)}")
    lines += [
        f"the {part} part has none of {_names(data, seen - there)}" for part, there in parts.items() if seen - there
    ]
    if lines:
        warnings.warn(f"{data.name}: {'; '.join(lines)}", DataWarning, stacklevel=3)


def _names(data: Data, labels: set[int], most: int = 6) -> str:
    names = [repr(data.classes[label]) for label in sorted(labels)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more classes" if len(names) > most else "")


def warn_of_copies(name: str, files: Sequence[str], hashes: Sequence[str], splits: Splits) -> None:
    """Warn of images of the test part that stand in another one too, byte for byte.

    Args:
        name: of the data set.
        files: their names.
        hashes: of their contents.
        splits: which file is in which part.
    """
    elsewhere = {hashes[i]: i for i in (*splits.train, *splits.defense)}
    copies = [(i, elsewhere[hashes[i]]) for i in splits.test if hashes[i] in elsewhere]
    if copies:
        first, second = (files[i] for i in copies[0])
        warnings.warn(
            f"{name}: {len(copies)} of {len(splits.test)} images of the test part are in the train or defense part "
            f"too, byte for byte, such as {first!r} and {second!r}: what is measured on them is too good",
            DataWarning,
            stacklevel=3,
        )
