"""Metrics: a number per sample."""

from .base import MapMetric
from .detection import auc, threshold_at
from .distance import L1, L2, IoU
from .prediction import confidence, hit, joint_success

__all__ = ["L1", "L2", "IoU", "MapMetric", "auc", "confidence", "hit", "joint_success", "threshold_at"]
