"""The inputs of an evaluation, their order and their goals: chosen once, the same for every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from .. import data as data_sets
from ..attacks import random_classes
from ..door import answer
from ..errors import InputError
from ..random_streams import derive
from ..recipe.experiment import Evaluation


@dataclass(frozen=True)
class Chunk:
    """Some of the evaluated images, with their labels and goals.

    Args:
        index: of the chunk.
        x: ``[B, C, H, W]``.
        y: labels ``[B]``.
        goal_class: ``[B]``, or ``None`` for untargeted attacks.
        samples: ``[B]``, positions in the test part.
    """

    index: int
    x: Tensor
    y: Tensor
    goal_class: Tensor | None
    samples: Tensor


@dataclass(frozen=True)
class Pool:
    """Benign images of the defense part (or any that are not evaluated) for goal maps of other classes."""

    x: Tensor
    y: Tensor


class Chosen(NamedTuple):
    """Positions in the test part.

    Args:
        judged: the inputs to evaluate.
        beyond: others, chosen alike, for what must not be seen in the evaluation.
    """

    judged: list[int]
    beyond: list[int]


@torch.no_grad()
def choose(
    models: Sequence[nn.Module], data: data_sets.Data, settings: Evaluation, seed: int, device: torch.device
) -> Chosen:
    """The inputs to evaluate, and as many others as rows are calibrated on, or as there are.

    They are the first that every model gets right, in a random order that takes turns by class. Where a class runs out
    of them, both have the same share of each class: a row calibrated on other classes than those that it is judged on
    would promise nothing.

    Args:
        models: the undefended classifiers.
        data: the data set.
        settings: their number, and whether only correctly classified ones are used.
        seed: of the order.
        device: where the models are.

    Raises:
        InputError: there are none.
    """
    order = data_sets.take(data.test, len(data.test), seed)
    found: list[int] = []
    labels: list[int] = []
    wanted, walked = settings.images + settings.calibration, len(order)
    for start in range(0, len(order), 64):
        if len(found) >= wanted:
            break
        positions = range(start, min(start + 64, len(order)))
        x, y = data_sets.stack(order, positions)
        right = torch.ones(len(y), dtype=torch.bool)
        for model in models if settings.only_correct else ():
            right &= answer(model, x.to(device)).argmax(1).cpu() == y
        for place, label, ok in zip(positions, y.tolist(), right.tolist(), strict=True):
            if ok and len(found) < wanted:
                found.append(order.indices[place])
                labels.append(label)
                walked = place + 1 if len(found) == wanted else walked
    if not found:
        raise InputError(
            f"there is nothing to judge: none of the {len(order)} inputs of the test part of {data.name} is classified "
            "right; are labels and classes in the same order, and is the classifier trained? "
            "evaluation.only_correct: false judges wrong ones too"
        )
    left = set(data_sets.labels_of(order)[walked:])
    if set(labels) <= left or len(found) <= settings.images:
        return Chosen(found[: settings.images], found[settings.images :])
    return _dealt(found, labels, settings.images)


def _dealt(found: Sequence[int], labels: Sequence[int], images: int) -> Chosen:
    """So many to judge, and the others, each class in proportion and in its order."""
    share = images / len(found)
    places: dict[int, list[int]] = {label: [] for label in labels}
    for place, label in enumerate(labels):
        places[label].append(place)
    # Whole inputs of each class, then one more of those with the largest remainder.
    parts = {label: share * len(own) for label, own in places.items()}
    given = {label: int(part) for label, part in parts.items()}
    for label in sorted(parts, key=lambda label: int(parts[label]) - parts[label])[: images - sum(given.values())]:
        given[label] += 1
    judged = {place for label, own in places.items() for place in own[: given[label]]}
    return Chosen(
        [found[place] for place in sorted(judged)], [p for place, p in enumerate(found) if place not in judged]
    )


@dataclass(frozen=True)
class Chunks(Sequence[Chunk]):
    """The evaluated inputs in chunks of ``settings.batch_size``: each is read when it is asked for, and kept by nobody.

    Args:
        positions: in the test part.
        data: the data set.
        settings: size of the chunks, and whether attacks have a goal class.
        seed: of the goals.
        device: where the chunks are put.
    """

    positions: Sequence[int]
    data: data_sets.Data
    settings: Evaluation
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return math.ceil(len(self.positions) / self.settings.batch_size)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | Sequence[Chunk]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        part = self.positions[index * self.settings.batch_size : (index + 1) * self.settings.batch_size]
        x, y = (t.to(self.device) for t in data_sets.stack(self.data.test, part))
        # From each sample's own stream: the same goals whatever the size of a chunk.
        goals = derive(self.seed, "goal")
        goal = random_classes(x, y, self.data.num_classes, goals) if self.settings.targeted else None
        return Chunk(index, x, y, goal, torch.tensor(part, device=self.device))
