"""What the explainers of tables share: calls of the model, random state, background rows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...door import answer
from ...errors import InputError, MissingDataError
from ...random_streams import generator, global_state
from ...training import Samples
from ..reference import Reference

Output = Literal["probability", "label", "logit"]
"""The output that is explained: the class's probability, 1 where it is predicted and else 0, or its logit."""


def package(name: str, who: str) -> Any:
    """A module of the extra ``tabular``.

    Raises:
        MissingDataError: with how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        raise MissingDataError(
            f"{who} needs the {root} package, or one that it needs is missing ({error}): "
            'pip install "robustexplain[tabular]"'
        ) from error


def rows_of(background: Reference) -> np.ndarray:
    """The background's rows as float64 ``[N, D]``."""
    return np.asarray(background.x.detach().cpu().double().numpy())


def checked_background(background: object, who: str) -> None:
    """Refuse anything but a reference of table rows.

    Raises:
        InputError: with what was found.
    """
    if not isinstance(background, Reference):
        raise InputError(f"{who}.background must be a Reference of table rows [N, D], got {type(background).__name__}")
    if background.x.dim() != 2:
        raise InputError(f"{who}.background must hold table rows [N, D], got {list(background.x.shape)}")


def output_function(model: nn.Module, like: Tensor, of: Output, limit: int) -> Callable[[np.ndarray], np.ndarray]:
    """The model as a NumPy function: rows ``[n, D]`` to the output of every class, float64 ``[n, K]``.

    Args:
        model: the classifier; it gets rows on the device and in the dtype of ``like``.
        like: an input.
        of: the output.
        limit: rows a forward pass, at most.
    """

    @torch.no_grad()
    def outputs(rows: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64))
        parts = (part.to(like.device, like.dtype) for part in inputs.split(limit))
        logits = torch.cat([answer(model, part).double().cpu() for part in parts])
        if of == "label":
            values = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()
        else:
            values = logits.softmax(1) if of == "probability" else logits
        return np.asarray(values.numpy())

    return outputs


@contextmanager
def restored_state(x: Tensor) -> Iterator[None]:
    """Restore the global random states after the block; suppress shap's log lines and convergence warnings.

    One thread enters at a time: these states, warnings and log levels are the process's, not the thread's.
    """
    from sklearn.exceptions import ConvergenceWarning

    logger = logging.getLogger("shap")
    with global_state(x.device), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def drawn_rows(data: Samples, size: int | None, seed: int) -> Tensor:
    """``size`` rows of a table without repetition, in the order of the data: ``[N, D]``; ``None`` or too many: all.

    Raises:
        InputError: an empty data set, or one of images.
    """
    number = len(data)
    if number == 0:
        raise InputError("there is no background to draw from: the data set is empty")
    chosen = torch.arange(number)
    if size is not None:
        chosen = torch.randperm(number, generator=generator(seed, "background"))[:size].sort().values
    rows = torch.stack([torch.as_tensor(data[i][0]) for i in chosen.tolist()])
    if rows.dim() != 2:
        raise InputError(f"the background must be table rows [D], and the data set holds {list(rows.shape[1:])}")
    return rows
