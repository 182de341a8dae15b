"""One training loop for everything that is trained: classifiers, interpreters, defenses, manipulated models.

On Accelerate, so that one process and many run the same code. Data order, noise and the split of a batch into micro
batches depend on the seed alone and not on the number of processes; training resumes at epoch boundaries.
"""

from ..data.base import Samples
from .loop import fit
from .losses import ClassifierLoss, CrossEntropy, Loss, TrainingStep, classification_loss, cross_entropy
from .modes import eval_mode, frozen
from .selection import Selection, Validation, Verdict
from .session import Session, accelerator_for
from .settings import Training
from .task import Task
from .tracking import EpochRecord, histories

__all__ = [
    "ClassifierLoss",
    "CrossEntropy",
    "EpochRecord",
    "Loss",
    "Samples",
    "Selection",
    "Session",
    "Task",
    "Training",
    "TrainingStep",
    "Validation",
    "Verdict",
    "accelerator_for",
    "classification_loss",
    "cross_entropy",
    "eval_mode",
    "fit",
    "frozen",
    "histories",
]
