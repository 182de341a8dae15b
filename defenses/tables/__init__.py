"""Defenses of the explainers of table rows."""

from .knn_cad import KNNCAD, query_gap

__all__ = ["KNNCAD", "query_gap"]
