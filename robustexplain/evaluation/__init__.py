"""The matrix: plan, run, store, statistics, report."""

from ..recipe.experiment import Evaluation
from .matrix import run
from .objects import Defended, evaluate
from .report import write_report
from .results import Results
from .statistics import Estimate, bootstrap, bootstrap_auc, paired
from .store import RunFolder

__all__ = [
    "Defended",
    "Estimate",
    "Evaluation",
    "Results",
    "RunFolder",
    "bootstrap",
    "bootstrap_auc",
    "evaluate",
    "paired",
    "run",
    "write_report",
]
