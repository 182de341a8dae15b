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
        """``[B]``: the share of trees that vote for attacked, from logits ``[B, M]``."""
        share = self.forest.predict_proba(features.detach().float().cpu().numpy())[:, 1]
        return torch.from_numpy(np.asarray(share)).to(features.device, torch.float32)

    def to_bytes(self) -> bytes:
        """skops' format."""
        return dumped(self.forest)

    @classmethod
    def from_bytes(cls, content: bytes) -> Forest:
        """Read skops' format; refuses types that are not trusted and archives of excessive decompressed size."""
        forest = loaded(content)
        if not hasattr(forest, "predict_proba"):
            raise InputError(f"the stored forest is a {type(forest).__name__}, which gives no probabilities")
        return cls(forest)
