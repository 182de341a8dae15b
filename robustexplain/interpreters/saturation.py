"""A warning for maps of a probability that does not move: a confident network's rounds to 0 or 1 everywhere."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..errors import SaturatedWarning
from .zero_gradient import is_unchecked

ADVICE = "explain the logit instead: of='logit' (or 'log_probability', where the method has it)"


CERTAIN = 15.0
"""The lead of a class, in logits, from which its probability hardly moves."""


def warn_of_faint_maps(name: str, maps: Tensor, logits: Tensor, advice: str = ADVICE) -> None:
    """Warn where a class is certain and the map of a probability is zero, or as small as an underflowing gradient."""
    if is_unchecked() or logits.shape[1] < 2:
        return
    best = logits.detach().topk(2, dim=1).values
    faint = maps.detach().flatten(1).abs().amax(1) <= torch.finfo(maps.dtype).tiny ** 0.5
    faint = faint & (best[:, 0] - best[:, 1] > CERTAIN)
    if bool(faint.any()):
        count = f"{int(faint.sum())} of {len(faint)} maps"
        warnings.warn(
            f"{count} of {name} are zero or nearly so: the class's probability does not move around these inputs, as "
            f"on a network that is so confident that it rounds to 0 or 1; {advice}",
            SaturatedWarning,
            stacklevel=4,
        )


def warn_of_equal_scores(scores: Tensor) -> None:
    """Warn where all perturbed inputs of a sample have a probability of 0 or 1, ``[B, n]``: the map says nothing."""
    if is_unchecked():
        return
    equal = (scores == scores[:, :1]).all(1) & ((scores[:, 0] == 0) | (scores[:, 0] == 1))
    if bool(equal.any()):
        warnings.warn(
            f"for {int(equal.sum())} of {len(equal)} inputs every perturbed one has the same probability, so that the "
            f"map says nothing: is the network so confident that it rounds to 0 or 1? {ADVICE}",
            SaturatedWarning,
            stacklevel=4,
        )
