"""Losses on predictions that keep a direction on confident networks, whose softmax rounds to 0 or 1.

Where a probability can still be told from 0 and 1 they are the cross-entropy, bit for bit. Beyond, a network with
logits ten thousand times as large (as defensive distillation leaves them) would give a gradient of zero, or one ten
thousand times as large as every other term's. There the losses go on along the same log odds, with a slope that falls
with their size, so that the direction stays and its length no longer depends on the scale of the logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rounding import wide

LARGEST = -math.log(2.0**-149)
"""Nats at which a probability is zero in float32."""
USUAL = 16.0
"""Beyond the limits the losses have the slopes of a network whose log odds are of this size."""


def toward(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy towards ``classes``, ``[B]``, by :func:`nats`.

    Args:
        logits: ``[B, K]``; in half precision the loss is computed in float32.
        classes: ``[B]``.
    """
    return nats(F.cross_entropy(wide(logits), classes, reduction="none"))


def away(logits: Tensor, classes: Tensor) -> Tensor:
    """Minus the cross-entropy of ``classes``, ``[B]``; where their probability rounds to 1, a loss that grows above 0.

    The cross-entropy's gradient is ``1 - p`` times that of the log odds; where ``1 - p`` is lost to rounding, a
    multiple of the latter is followed instead.
    """
    full = wide(logits)
    plain = -F.cross_entropy(full, classes, reduction="none")
    others = full.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    odds, limit = full.gather(1, classes[:, None])[:, 0] - others, _rounds_to_one(logits)
    return torch.where(odds > limit, beyond(odds, limit), -nats(-plain))


def nats(minus_log_p: Tensor) -> Tensor:
    """``-log p``; logarithmic where ``p`` is zero in float32, so that no term outweighs the others by its scale."""
    return torch.where(minus_log_p > LARGEST, LARGEST + beyond(minus_log_p, LARGEST), minus_log_p)


def lost(logits: Tensor, classes: Tensor) -> Tensor:
    """Zero, ``[B]``, unless the probability of ``classes`` is below rounding: then a way back along their log odds.

    For losses on probabilities, whose gradient is zero there.
    """
    limit = _rounds_to_one(logits)
    away_from = F.cross_entropy(wide(logits), classes, reduction="none")
    return torch.where(away_from > limit, beyond(away_from, limit), 0)


def beyond(values: Tensor, limit: float) -> Tensor:
    """``16 log(v / limit)`` for ``v > limit``, of slope ``16 / v``; elsewhere 0, without a gradient."""
    return USUAL * (torch.where(values > limit, values, limit) / limit).log()


def _rounds_to_one(logits: Tensor) -> float:
    """The log odds from which ``1 - p``, or a gradient of its size, is lost in the precision of the logits."""
    least = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
    return -math.log(max(least, torch.finfo(logits.dtype).tiny))


LEAST = 5.0
"""By how much the logits of a benign input differ at least where a lead of half a logit is asked for."""
FAINT, HUGE, SPREAD = 5e-3, 100.0, 16.0
"""Logits of a benign input that differ by less than the first, or by more than the second, are made to differ by the
third in losses."""


def extreme(logits: Tensor) -> bool:
    """Whether logits are near or beyond the bounds, so that each sample's own should be looked at."""
    spread = _spread(logits)
    return bool(((spread < 10 * FAINT) | (spread > HUGE / 3)).any())


def scale_of(logits: Tensor) -> Tensor | None:
    """``[B]``: factors that bring extreme logits of benign inputs to the usual size; ``None`` where all are usual.

    1 for a sample whose logits differ by 0.005 to 100, and for one whose logits are all equal. Logits of impossible
    classes (as a mask of -1e9 leaves them), far below all others, do not count.
    """
    spread = _spread(logits)
    usual = ((spread >= FAINT) & (spread <= HUGE)) | (spread == 0)
    return None if bool(usual.all()) else torch.where(usual, 1, SPREAD / torch.where(usual, 1, spread))


def lifted(logits: Tensor) -> Tensor:
    """``[B]``: factors that make benign logits differ by 5 at least; 1 where they do, and where all are equal."""
    spread = _spread(logits)
    small = (spread > 0) & (spread < LEAST)
    return torch.where(small, LEAST / torch.where(small, spread, 1), 1)


def bounded(logits: Tensor, most: float = 14.0) -> Tensor:
    """Logits ``[B, K]`` divided so that the first class leads the second by ``most`` at most; smaller leads are kept.

    For losses that are not ours: a cross-entropy of the result keeps a gradient. Ranks of classes do not change.
    """
    if logits.shape[1] < 2:
        return logits
    best = logits.detach().topk(2, dim=1).values
    lead = best[:, :1] - best[:, 1:]
    return torch.where(lead > most, logits * (most / torch.where(lead > most, lead, 1)), logits)


def _spread(logits: Tensor) -> Tensor:
    """``[B]``: the largest minus the smallest logit, without those beyond a gap a hundred times that before it."""
    ordered = wide(logits.detach()).sort(1, descending=True).values
    behind = ordered[:, :1] - ordered[:, 1:]
    jump = (behind[:, :-1] > FAINT) & (behind[:, 1:] > HUGE) & (behind[:, 1:] > 100 * behind[:, :-1])
    # The last class before the first jump.
    possible = jump.cumsum(1) == 0
    kept = behind.masked_fill(F.pad(~possible, (1, 0)), -torch.inf)
    return kept.amax(1)
