"""The costs of a defense for its user: accuracy on clean inputs, and time."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from .. import data as data_sets
from ..door import answer
from ..system import System
from ..training import Session
from .origins import Origins
from .prepared import Prepared
from .store import RunFolder

PATIENCE = 10.0
"""Seconds after which a system's time is not measured again; at least one call after the first is counted."""
FORWARD = 64
"""Smallest batch of the forward passes for the accuracy: no graph is kept, so that more fits than in an attack."""


def measure_costs(
    origins: Origins, prepared: Prepared, data: data_sets.Data, folder: RunFolder, session: Session, x: Tensor
) -> None:
    """Measure and write the costs of each row without a stored file.

    Args:
        origins: of the experiment: its rows and settings.
        prepared: their systems.
        data: the data set.
        folder: where files go.
        session: progress.
        x: inputs whose explanation is timed, on the systems' device: in one batch (``ms``, an input's share of it),
            and the first of them alone (``ms_single``, what one who waits for an answer waits).
    """
    experiment = origins.experiment
    size = max(experiment.evaluation.batch_size, FORWARD)
    accuracies: dict[nn.Module, float] = {}
    for row in experiment.rows:
        system = prepared.by_row.get(row.label)
        if system is None or folder.row(row.label).is_file():
            continue
        try:
            # Rows that explain one model differently have its accuracy in common.
            if system.model not in accuracies:
                accuracies[system.model] = clean_accuracy(system.model, data, size, 10_000, x.device)
            spent, single = milliseconds(system, x), milliseconds(system, x[:1])
        except Exception as error:
            # Its cells are holes already, with the traceback; the other rows go on.
            session.progress.say(f"no costs for {row.label}: {error}")
            continue
        words = {"row": row.label, "base": row.base, "accuracy": accuracies[system.model], "ms": spent}
        words |= {"batch": len(x), "ms_single": single}
        words["made_of"] = origins.row(row.label)
        folder.write_part(folder.row(row.label), words)


@torch.no_grad()
def milliseconds(system: System, x: Tensor, repeats: int = 5) -> float:
    """Median time of one call of the system over the batch, in ms an input; the first call is not counted."""
    times: list[float] = []
    while len(times) <= repeats and (len(times) < 2 or sum(times) < PATIENCE):
        _synchronise(x)
        start = time.perf_counter()
        system(x)
        _synchronise(x)
        times.append(time.perf_counter() - start)
    measured = sorted(times[1:])
    return 1e3 * measured[len(measured) // 2] / len(x)


@torch.no_grad()
def clean_accuracy(model: nn.Module, data: data_sets.Data, size: int, images: int, device: torch.device) -> float:
    """Accuracy on up to ``images`` samples of the test part."""
    part = data_sets.take(data.test, min(images, len(data.test)))
    right = 0
    for start in range(0, len(part), size):
        x, y = data_sets.stack(part, range(start, min(start + size, len(part))))
        right += int((answer(model, x.to(device)).argmax(1).cpu() == y).sum())
    return right / len(part)


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
