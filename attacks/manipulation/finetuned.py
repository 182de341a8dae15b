"""Attacks that fine-tune the model: the contract that all of them share."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustexplain import files
from robustexplain.autograd import layers
from robustexplain.data import stack, take
from robustexplain.errors import FieldError, FoolingFailedWarning, InputError, NotDifferentiableError
from robustexplain.fields import Count, Fraction, NonNegative, Positive
from robustexplain.interpreters import Explanation, Interpreter
from robustexplain.objectives import Distill, KeepPrediction, Misclassify, Objective
from robustexplain.random_streams import generator
from robustexplain.registry import INTERPRETERS, OBJECTIVES
from robustexplain.system import System, described
from robustexplain.training import Moment, Samples, Selection, Session, Training, fit

from .base import Manipulation
from .fine_tuning_task import Explaining, FineTuningTask
from .fooling_batch import FoolingBatch
from .logit_shift import shifted

HISTORY = "fooling.json"
"""Beside the checkpoint: figures of the honest weights and of each epoch's, on the adversary's held-out samples."""


@dataclass(frozen=True)
class FineTuned(Manipulation):
    """Fine-tunes the weights on ``L_keep + weight * L_fool`` (Heo et al. 2019, eq. 2), in eval mode.

    A subclass says what is to be seen where (``views``; more than that in ``batch``) and what the maps should become
    (``fooling``). Of all epochs, the one of the lowest objective wins among those that respect the budget, on samples
    that the adversary holds out.

    Args:
        weight: ``lambda``, of the map term.
        training: epochs, batch, learning rate of Adam: 1e-3 that falls to zero suits small networks; the authors take
            1e-7 to 1e-5 for ImageNet's, over many more steps.
        budget: share of right answers that may be lost on the samples held out.
        keep: the prediction term: cross-entropy towards ``labels`` (Heo et al.); or, unless the adversary wants
            another answer than the honest model gives, towards that model's ``outputs``, which for an adversary with
            few samples hold more of what it knows, errors included, or the squared distance to its ``probabilities``
            (Anders et al.).
        augment: mirror and shift images at random while training, by up to an eighth of a side: for few images of
            things that may be mirrored.
        parts: names of the modules whose weights may change, such as ``net.layer4``; none: all weights, as Heo et al.
            have it. The last ones suffice to fool maps of late layers, and with few samples forget far less.
        shift: let the rows of the last linear layer move by one vector, besides ``parts``; without ``parts``, nothing
            else. It adds one number to all logits of an input: no output changes, what explains a logit does (Srinivas
            and Fleuret 2021, arXiv:2006.09128), and maps of probabilities do not.
        samples: use at most so many of the adversary's samples, classes in equal numbers; ``None``: all of them.
        held_out: share of them that is held out.
        beta: train on ``softplus_beta`` in place of the rectifiers, for maps that have too little to give on
            rectifiers; what is kept is judged, and deployed, with the model's own.
        batch_size: largest number of samples in a pass while epochs are judged.
    """

    weight: NonNegative = 3.0
    training: Training = field(default_factory=lambda: Training(epochs=10, batch_size=32, lr=1e-3, weight_decay=0.0))
    budget: Fraction = 0.02
    keep: Literal["labels", "outputs", "probabilities"] = "labels"
    augment: bool = False
    parts: tuple[str, ...] = ()
    shift: bool = False
    samples: Count | None = None
    held_out: Fraction = 0.2
    beta: Positive | None = None
    batch_size: Count = 64

    compares: ClassVar[bool] = False
    """Whether the map term looks at the honest model's maps."""

    @abstractmethod
    def fooling(self) -> Objective:
        """What the maps should become."""

    def keeping(self) -> Objective:
        """What the predictions should stay."""
        kept: dict[str, Objective] = {
            "labels": Misclassify(),
            "outputs": Distill(),
            "probabilities": KeepPrediction(),
        }
        return kept[self.keep]

    def aimed(self, interpreter: Interpreter) -> Interpreter:
        """The interpreter whose maps are fooled: the system's own, or another one of the same model."""
        return interpreter

    def pool(self, honest: Interpreter, data: Samples, device: torch.device) -> FoolingBatch | None:
        """What lessons draw on beside their batch, made once of ``data``; ``None`` where they draw on nothing."""
        return None

    def fooling_batch(
        self, honest: Interpreter, x: Tensor, y: Tensor, moment: Moment, pool: FoolingBatch | None
    ) -> FoolingBatch:
        """What a batch teaches: its views, unless a subclass says otherwise; runs without autograd.

        Args:
            honest: explains the model as it was.
            x: ``[b, ...]``.
            y: ``[b]``, labels.
            moment: seed and epoch, for what is drawn.
            pool: what :meth:`pool` made of the samples that the batch is from.
        """
        views = self.views(honest, x, y).values()
        return reduce(
            FoolingBatch.join, (FoolingBatch.of(v, v.honest_maps(honest) if self.compares else None) for v in views)
        )

    def explained(self, honest: Interpreter, x: Tensor, target: Tensor | None) -> Explanation:
        """What an interpreter says of any number of inputs ``x``, ``batch`` at a time, on its own grid."""
        targets = [None] * len(x.split(self.batch_size)) if target is None else target.split(self.batch_size)
        parts = [honest.explain(a, b, native=True) for a, b in zip(x.split(self.batch_size), targets, strict=True)]
        return Explanation(torch.cat([p.logits for p in parts]), torch.cat([p.maps for p in parts]))

    def summaries(self) -> tuple[str, str]:
        """What is changed and what is wanted."""
        return self.changes, " + ".join(_word(part) for part in (self.fooling(), self.keeping()))

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # refused at the door; for the type checker
        if not system.interpreter.differentiable:
            able = ", ".join(e.name for e in INTERPRETERS if getattr(e.build, "differentiable", False))
            raise NotDifferentiableError(
                f"{type(self).__name__} needs maps with a gradient to the weights, and "
                f"{type(system.interpreter).__name__} has none; aim it at one of {able}, and see what transfers"
            )
        interpreter = copy.deepcopy(system.interpreter)
        model = interpreter.model.to(session.device).requires_grad_(False).eval()
        school = FineTuningTask(self, self.aimed(system.interpreter), *self._split(data), session)
        selection = Selection(school.judge)
        identity = [asdict(self), files.digest_tensors(model.state_dict()), described(interpreter), school.digest]
        with self._loosened(model, stack(school.data, range(1))[0].to(session.device)):
            module = Explaining(self.aimed(interpreter), self.beta)
            fit(module, school.loss, school.data, self.training, name="fooling", seed=self.seed, session=session,
                identity=identity, evaluating=True, selection=selection)  # fmt: skip
        self._report(selection, session)
        model.requires_grad_(False)
        return replace(system, model=model, interpreter=interpreter)

    def _loosened(self, model: nn.Module, x: Tensor) -> AbstractContextManager[None]:
        """Let what is fine-tuned have gradients; within the block also the shift."""
        for part in self._parts(model):
            part.requires_grad_(True)
        return shifted(model, x) if self.shift else nullcontext()

    def _parts(self, model: nn.Module) -> list[nn.Module]:
        """The modules whose weights may change."""
        found = [layers.submodule(model, name) for name in self.parts]
        if empty := [n for n, part in zip(self.parts, found, strict=True) if next(part.parameters(), None) is None]:
            raise FieldError(type(self).__name__, "parts", f"must hold weights to fine-tune; {empty[0]!r} holds none")
        return found or ([] if self.shift else [model])

    def _split(self, data: Samples) -> tuple[Samples, Samples]:
        """The samples to train on, and those held out."""
        if self.samples is not None and self.samples < len(data):  # type: ignore[arg-type]
            data = take(data, self.samples, self.seed)
        size: int = len(data)  # type: ignore[arg-type]
        held = max(1, math.floor(self.held_out * size))
        if size - held < 1:
            raise InputError(f"{type(self).__name__} needs samples to train on and to hold out, got {size}")
        order = torch.randperm(size, generator=generator(self.seed, "held out")).tolist()
        return torch.utils.data.Subset(data, sorted(order[held:])), torch.utils.data.Subset(data, sorted(order[:held]))

    def _report(self, selection: Selection, session: Session) -> None:
        if session.folder is not None and session.accelerator.is_main_process:
            files.write_json(session.folder / HISTORY, {"kept": selection.kept, "epochs": selection.history})
        if selection.kept == 0:
            warnings.warn(
                f"{type(self).__name__} fooled nothing: no epoch lowered its objective within the accuracy budget of "
                f"{self.budget:.1%}, so the weights are the honest ones; try another lr or weight, or more epochs",
                FoolingFailedWarning,
                stacklevel=4,
            )


def _word(objective: Objective) -> str:
    return " + ".join(OBJECTIVES.name_of(type(part)) for _, part in objective.terms())
