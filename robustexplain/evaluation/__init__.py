"""The matrix: plan, run, store, statistics, report."""

from ..recipe.experiment import Evaluation
from .differences import Difference, holm, paired, paired_shares
from .matrix import run
from .objects import Defended, evaluate
from .report import write_report
from .results import Results
from .statistics import Estimate, bootstrap, over_seeds, separation, share
from .store import RunFolder

__all__ = [
    "Defended",
    "Difference",
    "Estimate",
    "Evaluation",
    "Results",
    "RunFolder",
    "bootstrap",
    "evaluate",
    "holm",
    "over_seeds",
    "paired",
    "paired_shares",
    "run",
    "separation",
    "share",
    "write_report",
]
