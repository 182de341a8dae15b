"""A random forest that can be stored without pickle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.models.skops_file import dumped, loaded
from robustexplain.registry import PARTS


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
