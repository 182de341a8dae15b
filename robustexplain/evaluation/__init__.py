"""The matrix: plan, run, store, statistics, report."""

from .matrix import run
from .report import write_report
from .statistics import Estimate, bootstrap, bootstrap_auc, paired
from .store import RunFolder

__all__ = ["Estimate", "RunFolder", "bootstrap", "bootstrap_auc", "paired", "run", "write_report"]
