"""A random forest that can be stored without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.models.skops_file import dumped, loaded
from robustexplain.registry import PARTS

WIDTHS = (0.25, 1.0, 4.0)
"""Of the noise that smooths a forest, as shares of the spread of its thresholds: narrow ones are faithful, wide ones
have a gradient far from every threshold."""
_LEAST = 1e-4


class Leaves(NamedTuple):
    """The leaves of a forest that vote for attacked: boxes of features, whose votes add up where they overlap.

    Args:
        low: ``[L, M]``.
        high: ``[L, M]``.
        votes: ``[L]``, shares of all trees.
        spread: ``[M]``, standard deviation of each feature's thresholds.
    """

    low: Tensor
    high: Tensor
    votes: Tensor
    spread: Tensor


@PARTS.register("forest")
@dataclass(frozen=True, eq=False)
class Forest:
    """scikit-learn's random forest over the networks' logits, stored by skops (no pickle, no code).

    Args:
        forest: a fitted ``RandomForestClassifier`` of two classes; class 1 is attacked.
    """

    forest: Any

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, trees: int, seed: int) -> Forest:
        """Fit to logits ``[N, M]`` and labels ``[N]`` (1 is attacked)."""
        from sklearn.ensemble import RandomForestClassifier

        forest = RandomForestClassifier(trees, min_samples_leaf=3, random_state=seed % 2**32)
        return cls(forest.fit(features.cpu().numpy(), labels.cpu().numpy()))

    def __call__(self, features: Tensor) -> Tensor:
        """``[B]``: the share of trees that vote for attacked, from finite logits ``[B, M]``; NaN for others."""
        rows = features.detach().float().cpu().contiguous().numpy()
        # Tree by tree: predict_proba of the forest starts a pool of threads in every call, and warns in threads.
        total = sum(tree.predict_proba(rows, check_input=False) for tree in self.forest.estimators_)
        share = np.asarray(total)[:, 1] / len(self.forest.estimators_)
        share[~np.isfinite(rows).all(1)] = np.nan
        return torch.from_numpy(share).to(features.device, torch.float32)

    def smoothed(self, features: Tensor) -> Tensor:
        """``[B]``: log-odds of the votes expected under normal noise on ``features`` ``[B, M]``, which have a gradient.

        In closed form, since a forest is constant on boxes; the mean over noise of several :data:`WIDTHS`.
        """
        low, high, votes, spread = (part.to(features.device) for part in self._leaves)
        wide, total = features[:, None].to(torch.promote_types(features.dtype, torch.float32)), torch.zeros(())
        for width in WIDTHS:
            above, below = (torch.special.ndtr((edge - wide) / (width * spread)) for edge in (high, low))
            share = ((above - below).prod(2) * votes).sum(1).clamp(_LEAST, 1 - _LEAST)
            total = total + share.logit()
        return (total / len(WIDTHS)).to(features.dtype)

    @cached_property
    def _leaves(self) -> Leaves:
        boxes = [box for tree in self.forest.estimators_ for box in _boxes(tree.tree_)]
        low, high, votes = (torch.tensor(np.array(part), dtype=torch.float32) for part in zip(*boxes, strict=True))
        edges = torch.cat([low, high])
        known = edges.isfinite()
        middle = edges.where(known, 0).sum(0) / known.sum(0).clamp(min=1)
        spread = ((edges - middle).where(known, 0).square().sum(0) / known.sum(0).clamp(min=1)).sqrt()
        spread = spread.where(spread > 0, 1.0)
        return Leaves(low, high, votes / len(self.forest.estimators_), spread)

    def to_bytes(self) -> bytes:
        """skops' format."""
        return dumped(self.forest)

    @classmethod
    def from_bytes(cls, content: bytes) -> Forest:
        """Read skops' format; refuses types that are not trusted and archives of excessive decompressed size."""
        forest = loaded(content)
        if not hasattr(forest, "estimators_"):
            raise InputError(f"the stored forest is a {type(forest).__name__}, which has no trees")
        return cls(forest)


def _boxes(tree: Any) -> Iterator[tuple[Any, Any, float]]:
    """Bounds and share of votes of a tree's leaves."""
    size = tree.n_features
    todo = [(0, np.full(size, -np.inf), np.full(size, np.inf))]
    while todo:
        node, low, high = todo.pop()
        left, right = tree.children_left[node], tree.children_right[node]
        if left == right:
            count = tree.value[node][0]
            yield low, high, float(count[1] / count.sum())
            continue
        feature, edge = tree.feature[node], tree.threshold[node]
        less, more = high.copy(), low.copy()
        less[feature], more[feature] = min(high[feature], edge), max(low[feature], edge)
        todo += [(left, low, less), (right, more, high)]
