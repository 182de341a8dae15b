"""A look at the samples of a training, by which a checkpoint tells whether its data are the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from .. import files
from ..data.arrays import Arrays
from ..data.base import Samples, labels_of, stack
from ..data.folders import Files
from ..data.tables import TensorTable

Glimpse: TypeAlias = dict[str, Any]
"""``labels``: a hash; ``shape``: of a sample; ``moments``: of groups of samples; ``held``: whether all in memory."""
FEW, GROUPS = 64, 1024
"""How many samples are looked at where each must be decoded, and in how many groups where all are in memory."""


def glimpse_of(data: Samples) -> Glimpse:
    """The labels, and all inputs where they are in memory; else some samples, evenly spaced.

    Groups are of neighbours, and so small that one other sample moves the moments of its group.
    """
    held, rows = _in_memory(data)
    if held is None or not len(data):
        return _of_some(data)
    inputs, labels = held
    chosen = torch.arange(len(inputs)) if rows is None else rows
    size = max(1, -(-len(chosen) // GROUPS))
    groups = (inputs[part] for part in chosen.to(inputs.device).split(size))
    return _described(labels[chosen], data[0][0], groups, held=True)


def alike(one: object, other: Glimpse) -> bool:
    """Whether two glimpses are of the same data: labels exactly, inputs on whatever machine they were decoded.

    On another kind of machine inputs differ in last bits, which a hash would see.
    """
    # Earlier versions wrote a list.
    if not isinstance(one, dict) or any(one.get(key) != other[key] for key in ("labels", "shape", "held")):
        return False
    a, b = (torch.tensor(each["moments"], dtype=torch.float64) for each in (one, other))
    # What was decoded differs by more than what was held: another sample among many moves a group's moments little.
    near = (1e-5, 1e-6) if other["held"] else (1e-3, 1e-4)
    return a.shape == b.shape and torch.allclose(a, b, rtol=near[0], atol=near[1])


def _in_memory(data: Samples) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Inputs and labels that are held in memory, and which of them are the samples; ``None`` for all."""
    if isinstance(data, Subset):
        held, rows = _in_memory(cast(Samples, data.dataset))
        own = torch.as_tensor(data.indices, dtype=torch.long)
        return held, own if rows is None else rows[own]
    # A subclass may give other samples than it holds.
    if type(data) is TensorDataset and len(data.tensors) == 2:
        return (data.tensors[0], data.tensors[1].cpu()), None
    if type(data) is Arrays:
        return (data.images, torch.tensor(data.labels)), None
    if type(data) is TensorTable:
        return (data.rows, torch.tensor(data.labels)), None
    return None, None


def _of_some(data: Samples) -> Glimpse:
    x, y = stack(data, range(0, len(data), max(1, len(data) // FEW)))
    whole = data
    while isinstance(whole, Subset):
        whole = cast(Samples, whole.dataset)
    return _described(torch.tensor(labels_of(data)) if isinstance(whole, Files) else y, x[0], x, held=False)


def _described(labels: Tensor, sample: Tensor, groups: Iterable[Tensor], *, held: bool) -> Glimpse:
    moments = torch.stack([_moments(group) for group in groups])
    return {
        "labels": files.digest_tensors({"labels": labels}),
        "shape": list(sample.shape),
        "held": held,
        "moments": moments.tolist(),
    }


def _moments(group: Tensor) -> Tensor:
    """Mean, mean square, and a mean weighted by place, of inputs, ``[3]``; 8-bit ones are scaled to ``[0, 1]``.

    The first two do not see inputs in another order, or mirrored ones.
    """
    flat = group.double().flatten()
    flat = flat / 255 if group.dtype == torch.uint8 else flat
    places = torch.linspace(0, 1, len(flat), dtype=flat.dtype, device=flat.device)
    return torch.stack([flat.mean(), flat.square().mean(), (flat * places).mean()]).cpu()
