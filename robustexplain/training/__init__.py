"""One training loop for everything that is trained: classifiers, interpreters, defenses, manipulated models.

On Accelerate, so that one process and many run the same code. Data order, noise and the split of a batch into micro
batches depend on the seed alone and not on the number of processes; training resumes at epoch boundaries.
"""

from .loop import fit
from .losses import Loss, Samples, TrainingStep, cross_entropy
from .modes import frozen
from .selection import Selection, Verdict
from .session import Session, accelerator_for
from .settings import Training

__all__ = [
    "Loss",
    "Samples",
    "Selection",
    "Session",
    "Training",
    "TrainingStep",
    "Verdict",
    "accelerator_for",
    "cross_entropy",
    "fit",
    "frozen",
]
