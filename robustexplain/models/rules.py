"""Classifiers of table rows that are one readable rule: the biased and the innocent models of fairness audits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..registry import MODELS
from .classifier import ModelSpec
from .tables import TableClassifier


class FeatureRule(nn.Module):
    """Class 1 where an odd number of columns lies above their thresholds, else class 0 (Slack et al. 2020, section 4).

    One column is a threshold rule (their ``f``: unfavourable where race is above 0), two are an exclusive or (their
    ``psi`` of two features). Hard, as theirs: the logit of the decided class is ``margin``, all others are 0, and the
    gradient is zero everywhere.

    Args:
        in_features: D, columns of a row.
        columns: indices of the columns that decide.
        thresholds: a number a column, in the data's units; a value equal to its threshold is not above it.
        num_classes: K; classes 2 and up are never decided.
        margin: of the decided logit: 20 makes its probability one up to 2e-9.

    Raises:
        InputError: columns out of range or twice, another number of thresholds, fewer than two classes.
    """

    thresholds: Tensor

    def __init__(
        self,
        in_features: int,
        columns: Sequence[int],
        thresholds: Sequence[float],
        *,
        num_classes: int = 2,
        margin: float = 20.0,
    ) -> None:
        super().__init__()
        checked_columns(columns, in_features, "columns")
        if len(thresholds) != len(columns) or not columns or not all(map(math.isfinite, thresholds)):
            raise InputError(
                f"a rule needs one finite threshold a column, got {len(columns)} columns and {list(thresholds)}"
            )
        if num_classes < 2 or not margin > 0:
            raise InputError(f"a rule needs two classes and a margin above 0, got {num_classes} and {margin}")
        self.in_features, self.num_classes, self.margin = in_features, num_classes, float(margin)
        self.columns = tuple(int(column) for column in columns)
        self.register_buffer("thresholds", torch.tensor([float(value) for value in thresholds], dtype=torch.float32))
        options = {
            "in_features": in_features,
            "columns": list(self.columns),
            "thresholds": [float(value) for value in thresholds],
        }
        self.spec = ModelSpec("column-rule", {**options, "num_classes": num_classes, "margin": self.margin})

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of rows ``[B, D]``.

        Raises:
            InputError: rows of another width.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise InputError(f"x must have shape [B, {self.in_features}], got {list(x.shape)}")
        read = x[:, list(self.columns)]
        odd = (read > self.thresholds.to(x.dtype)).sum(1) % 2
        # The zero keeps the rule in the graph: its gradient is zero rather than absent.
        return nn.functional.one_hot(odd, self.num_classes) * self.margin + 0 * read.sum(1, keepdim=True)


def checked_columns(columns: Sequence[int], in_features: int, name: str) -> None:
    """Refuse column indices that are no integers, out of range or given twice.

    Raises:
        InputError: naming what they are for.
    """
    for column in columns:
        if isinstance(column, bool) or not isinstance(column, int) or not 0 <= column < in_features:
            raise InputError(f"{name} must be column indices in 0 to {in_features - 1}, got {column!r}")
    if len(set(columns)) != len(columns):
        raise InputError(f"{name} must be given once each, got {list(columns)}")


@MODELS.register("feature-rule", paper="Slack et al. 2020, section 4")
def feature_rule(
    num_classes: int = 2, in_features: int = 2, columns: Sequence[int] = (0,), thresholds: Sequence[float] | None = None
) -> TableClassifier:
    """A biased classifier without weights: class 1 where a column is above a threshold; of several columns, their XOR.

    Args:
        num_classes: K, at least 2.
        in_features: D, the columns of the table.
        columns: indices of the columns that decide.
        thresholds: a number a column, in standard deviations from the column's mean once the classifier is
            standardised, else in the data's units; default 0 for each.

    Raises:
        InputError: columns out of range or twice, another number of thresholds.
    """
    limits = [0.0] * len(columns) if thresholds is None else thresholds
    rule = FeatureRule(in_features, columns, limits, num_classes=num_classes)
    return TableClassifier(rule, num_classes, in_features)
