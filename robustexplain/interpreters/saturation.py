"""A warning for maps of a probability that does not move: a confident network's rounds to 0 or 1 everywhere."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..errors import SaturatedWarning
from .zero_gradient import is_unchecked

ADVICE = "explain the logit instead: of='logit' (or 'log_probability', where the method has it)"


def warn_of_faint_maps(name: str, maps: Tensor) -> None:
    """Warn where a map of a probability is zero, or as small as a gradient that underflows."""
    if is_unchecked():
        return
    faint = maps.detach().flatten(1).abs().amax(1) <= torch.finfo(maps.dtype).tiny ** 0.5
    if bool(faint.any()):
        count = f"{int(faint.sum())} of {len(faint)} maps"
        warnings.warn(
            f"{count} of {name} are zero or nearly so: the class's probability does not move around these inputs, as "
            f"on a network that is so confident that it rounds to 0 or 1; {ADVICE}",
            SaturatedWarning,
            stacklevel=4,
        )


def warn_of_equal_scores(scores: Tensor) -> None:
    """Warn where all perturbed inputs of a sample have the same score, ``[B, n]``: the map says nothing."""
    if is_unchecked() or scores.shape[1] < 2:
        return
    equal = (scores == scores[:, :1]).all(1)
    if bool(equal.any()):
        warnings.warn(
            f"for {int(equal.sum())} of {len(equal)} inputs every perturbed one has the same probability, so that the "
            f"map says nothing: is the network so confident that it rounds to 0 or 1? {ADVICE}",
            SaturatedWarning,
            stacklevel=4,
        )
