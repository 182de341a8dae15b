"""The matrix: plan, run, store, statistics, report."""

from .report import write_report
from .run import run
from .statistics import Estimate, bootstrap, bootstrap_auc, paired
from .store import RunFolder

__all__ = ["Estimate", "RunFolder", "bootstrap", "bootstrap_auc", "paired", "run", "write_report"]
