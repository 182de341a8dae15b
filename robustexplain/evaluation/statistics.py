"""Means with 95% intervals, by bootstrap over samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..metrics import auc
from ..random_streams import derive


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` samples and the ends of its 95% interval; ``None`` where there is no sample."""

    value: float | None
    low: float | None
    high: float | None
    count: int

    def as_dict(self) -> dict[str, float | int | None]:
        """As plain data."""
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


def bootstrap(values: Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of ``values`` ``[N]`` and its 95% percentile interval over resampled samples.

    NaN marks a sample on which the measure is undefined: it is left out and not counted.
    """
    array = values.detach().double().cpu().numpy()
    array = array[~np.isnan(array)]
    if not len(array):
        return Estimate(None, None, None, 0)
    means = _resampled(array, resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), len(array))


def bootstrap_auc(clean: Tensor, attacked: Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Area under the ROC curve of two batches of scores, with its 95% percentile interval over resampled samples."""
    random = np.random.default_rng(derive(seed, "auc", len(clean), len(attacked)))
    values = []
    for _ in range(resamples):
        some, others = (torch.from_numpy(random.integers(len(s), size=len(s))) for s in (clean, attacked))
        values.append(auc(clean.cpu()[some], attacked.cpu()[others]))
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(auc(clean, attacked), float(low), float(high), len(attacked))


def paired(values: Tensor, reference: Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean difference of two measures of the same samples, with its interval: 0 outside it is a difference."""
    return bootstrap(values.double() - reference.double(), resamples, seed)


def _resampled(array: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(derive(seed, "bootstrap", len(array)))
    # In blocks: all resamples at once would need resamples x N memory.
    block = max(1, int(4e6) // len(array))
    parts = []
    for start in range(0, resamples, block):
        rows = random.integers(len(array), size=(min(block, resamples - start), len(array)))
        parts.append(array[rows].mean(1))
    return np.concatenate(parts)
