"""Defenses of the explainers of table rows."""

from .focused import FocusedSampling
from .knn_cad import KNNCAD, query_gap

__all__ = ["KNNCAD", "FocusedSampling", "query_gap"]
