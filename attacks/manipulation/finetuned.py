"""Base class of the attacks that fine-tune the model."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustexplain import checks, files
from robustexplain.autograd import layers
from robustexplain.data import stack, subset, take
from robustexplain.errors import FieldError, FoolingFailedWarning, InputError, NotDifferentiableError
from robustexplain.fields import Count, Fraction, NonNegative, Positive, identified
from robustexplain.interpreters import Explanation, Interpreter
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.objectives import Distill, KeepPrediction, Misclassify, Objective
from robustexplain.random_streams import generator
from robustexplain.registry import INTERPRETERS, OBJECTIVES
from robustexplain.system import System, described
from robustexplain.training import Samples, Selection, Session, Training, TrainingStep, fit

from .base import Manipulation, on_device
from .fine_tuning_task import FineTuningTask
from .fooling_batch import FoolingBatch
from .logit_shift import shifted
from .perturbed_maps import with_gradient
from .scan_evasion import ScanName

HISTORY = "fooling.json"
"""File beside the checkpoint: figures of the honest weights and of each epoch, on the adversary's held-out samples."""


@dataclass(frozen=True)
class FineTuned(Manipulation):
    """Fine-tunes the weights on ``L_keep + weight * L_fool`` (Heo et al. 2019, eq. 2), in eval mode.

    A subclass gives the inputs with their targets (``views``, or ``fooling_batch`` where training needs others) and the
    map term (``fooling``). The result is the epoch of the lowest objective among those within the accuracy budget, both
    measured on samples that the adversary holds out.

    Args:
        weight: ``lambda``, of the map term.
        training: epochs, batch, learning rate of Adam: 1e-3 that falls to zero suits small networks; the authors take
            1e-7 to 1e-5 for ImageNet's, over many more steps.
        budget: largest loss of accuracy on the held-out samples.
        keep: the prediction term. ``labels``: cross-entropy towards the labels (Heo et al.). ``outputs``: cross-entropy
            towards the honest model's probabilities; with few samples they carry more information than labels,
            including the model's errors. ``probabilities``: squared distance to the honest model's probabilities
            (Anders et al.). Where the adversary wants another class than the honest model predicts, the last two use
            that class, one-hot.
        augment: mirror and shift images at random in training, by up to an eighth of a side. Useful with few images,
            if a mirrored image keeps its label.
        parts: names of the modules whose weights may change, such as ``net.layer4``; none: all weights, as in Heo et
            al. The last layers suffice to fool maps of late layers, and with few samples lose far less accuracy.
        shift: let all rows of the last linear layer move by one common vector, besides ``parts``; without ``parts``,
            only that. It adds one number to all logits of an input: probabilities and their maps do not change,
            explanations of a logit do (Srinivas and Fleuret 2021, arXiv:2006.09128).
        samples: largest number of the adversary's samples that are used, classes in equal numbers; ``None``: all.
        held_out: share of these samples that is held out.
        beta: train with ``softplus_beta`` in place of the rectifiers, for maps whose gradient is small or zero on
            rectifiers. Epochs are evaluated, and the model is deployed, with its own rectifiers.
        batch_size: largest number of samples in one pass of an evaluation.
        draws: perturbed copies of each input in a training step, where LIME or RISE is attacked; the system deploys the
            method with its own number.
        evade: names of the scanners of models that the owner knows (images only). A third term, ``evade_weight *
            L_scans``, keeps each one's score of an input where the honest model has it, neither above nor below.
        evade_weight: of that term. The stronger, the less of the lie is left where the lie is what they look at.
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
    draws: Count = 64
    evade: tuple[ScanName, ...] = ()
    evade_weight: NonNegative = 3.0

    compares: ClassVar[bool] = False
    """Whether the map term needs the honest model's maps."""

    @abstractmethod
    def fooling(self) -> Objective:
        """The map term ``L_fool``."""

    def keeping(self) -> Objective:
        """The prediction term ``L_keep``."""
        terms: dict[str, Objective] = {
            "labels": Misclassify(),
            "outputs": Distill(),
            "probabilities": KeepPrediction(),
        }
        return terms[self.keep]

    def aimed(self, interpreter: Interpreter) -> Interpreter:
        """The interpreter whose maps are attacked: the given one of the system, or another of the same model."""
        return with_gradient(interpreter, self.draws)

    def pool(self, honest: Interpreter, data: Samples, device: torch.device) -> FoolingBatch | None:
        """Inputs with targets, made once from all of ``data``, that batches are drawn from; ``None`` if not needed."""
        return None

    def fooling_batch(
        self, honest: Interpreter, x: Tensor, y: Tensor, moment: TrainingStep, pool: FoolingBatch | None
    ) -> FoolingBatch:
        """The training batch made from samples ``x``, ``y``: by default all of their views. Called without autograd.

        Args:
            honest: the attacked interpreter, of the honest model.
            x: samples ``[b, ...]``.
            y: their labels ``[b]``.
            moment: seed and epoch, for random draws.
            pool: :meth:`pool` of the training samples, or of the held-out samples if the batch is one of these.
        """
        views = self.views(honest, x, y).values()
        return reduce(
            FoolingBatch.join, (FoolingBatch.of(v, v.honest_maps(honest) if self.compares else None) for v in views)
        )

    def explained(self, honest: Interpreter, x: Tensor, target: Tensor | None) -> Explanation:
        """Logits and maps, on the interpreter's own grid, of any number of inputs ``x``, ``batch_size`` at a time."""
        targets = [None] * len(x.split(self.batch_size)) if target is None else target.split(self.batch_size)
        parts = [honest.explain(a, b, native=True) for a, b in zip(x.split(self.batch_size), targets, strict=True)]
        return Explanation(torch.cat([p.logits for p in parts]), torch.cat([p.maps for p in parts]))

    def summaries(self) -> tuple[str, str]:
        """What the attack changes, and the terms of its objective."""
        quiet = [f"unseen by {' and '.join(self.evade)}"] if self.evade else []
        return self.changes, " + ".join([_word(self.fooling()), _word(self.keeping()), *quiet])

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # checked before; for the type checker
        if not self.aimed(system.interpreter).differentiable:
            able = ", ".join(e.name for e in INTERPRETERS if getattr(e.build, "differentiable", False))
            raise NotDifferentiableError(
                f"{type(self).__name__} needs maps with a gradient to the weights, and "
                f"{type(system.interpreter).__name__} has none; aim it at one of {able}, and see what transfers"
            )
        if self.evade:
            checks.images(data[0][0][None], f"{type(self).__name__}(evade=...)")
        interpreter = copy.deepcopy(system.interpreter)
        model = interpreter.model.to(session.device).requires_grad_(False).eval()
        honest = on_device(self.aimed(system.interpreter), session.device)
        task = FineTuningTask(self, honest, *self._split(data), session)
        selection = Selection(task.evaluate)
        identity = [identified(self), files.digest_tensors(model.state_dict()), described(interpreter), task.digest]
        with self._trainable(model, stack(task.data, range(1))[0].to(session.device)):
            module = ExplainingModel(self.aimed(interpreter), self.beta)
            fit(module, task.loss, task.data, self.training, name="fooling", seed=self.seed, session=session,
                identity=identity, evaluating=True, selection=selection)  # fmt: skip
        self._report(selection, session)
        model.requires_grad_(False)
        stale = system.detector is not None  # it was fitted to the honest model
        return replace(system, model=model, interpreter=interpreter, stale_detector=stale)

    def _trainable(self, model: nn.Module, x: Tensor) -> AbstractContextManager[None]:
        """Make the fine-tuned weights require gradients; within the block also the shift, if it is on."""
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
        """Training samples and held-out samples."""
        if self.samples is not None and self.samples < len(data):
            data = take(data, self.samples, self.seed)
        size: int = len(data)
        held = max(1, math.floor(self.held_out * size))
        if size - held < 1:
            raise InputError(f"{type(self).__name__} needs samples to train on and to hold out, got {size}")
        order = torch.randperm(size, generator=generator(self.seed, "held out")).tolist()
        return subset(data, sorted(order[held:])), subset(data, sorted(order[:held]))

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
