"""A random forest that can be stored without pickle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.registry import PARTS

TREES = ("sklearn.tree._tree.Tree",)
"""What a forest is made of and skops does not trust by itself: arrays of numbers, no code."""


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
        """``[B]``: the share of trees that say attacked, from logits ``[B, M]``."""
        share = self.forest.predict_proba(features.detach().float().cpu().numpy())[:, 1]
        return torch.from_numpy(np.asarray(share)).to(features.device, torch.float32)

    def to_bytes(self) -> bytes:
        """skops' format."""
        from skops import io

        content: bytes = io.dumps(self.forest)
        return content

    @classmethod
    def from_bytes(cls, content: bytes) -> Forest:
        """Read skops' format; any type but those that skops trusts and scikit-learn's trees is refused."""
        from skops import io

        unknown = sorted(set(io.get_untrusted_types(data=content)) - set(TREES))
        if unknown:
            raise InputError(f"the saved forest holds types that are not trusted: {', '.join(unknown)}")
        return cls(io.loads(content, trusted=list(TREES)))
