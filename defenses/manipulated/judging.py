"""What the scores of scanners mean: beside those of honest models."""

from __future__ import annotations

from torch import Tensor

from robustexplain.errors import InputError


def p_values(honest: Tensor, scores: Tensor) -> Tensor:
    """``(1 + #{honest >= score}) / (n + 1)``: the chance that an honest model scores so high (Vovk et al. 2005).

    Exact if the scanned model was made as the ``n`` honest ones were. The smallest value is ``1 / (n + 1)``: an alarm
    at 5% takes 19 honest models.

    Args:
        honest: scores ``[n]`` of honest models.
        scores: ``[m]``.

    Returns:
        ``[m]``, in ``(0, 1]``.

    Raises:
        InputError: no honest scores, or NaN.
    """
    if honest.dim() != 1 or scores.dim() != 1 or not len(honest):
        raise InputError(f"scores must be [n] and [m] with n > 0, got {list(honest.shape)} and {list(scores.shape)}")
    if honest.isnan().any() or scores.isnan().any():
        raise InputError("scores of models hold NaN")
    reached = (honest[None] >= scores[:, None]).sum(1)
    return (1 + reached).double() / (len(honest) + 1)
