"""Attacks that fine-tune the model: what is taught on a batch, and the loop that all of them share."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain import files
from robustexplain.activations import Softplus, swapped
from robustexplain.data import labels_of, stack, take
from robustexplain.errors import FoolingFailedWarning, InputError, NotDifferentiableError
from robustexplain.fields import Count, Fraction, NonNegative, Positive
from robustexplain.interpreters import Interpreter
from robustexplain.objectives import Distill, Goal, Misclassify, Objective, Seen
from robustexplain.registry import INTERPRETERS, OBJECTIVES
from robustexplain.streams import Streams, generator
from robustexplain.system import System, described
from robustexplain.training import Judgement, Moment, Samples, Selection, Session, Training, fit

from .base import ModelAttack

Terms = list[tuple[Tensor, Tensor]]
"""Losses ``[n]``, and how much each counts ``[n]``."""
HISTORY = "fooling.json"
"""Beside the checkpoint: figures of the honest weights and of each epoch's, on the adversary's held-out samples."""


@dataclass(frozen=True)
class Lesson:
    """What one batch teaches: inputs, what should be predicted on them, and what their maps should be.

    Args:
        goal: of the explained inputs ``goal.x`` ``[n, ...]``: the class to predict (``goal_class``), the class
            explained, and whatever the objectives ask for, maps on the interpreter's own grid.
        predicted: ``[n]``, how much each counts in the prediction term.
        shown: ``[n]``, how much each counts in the map term.
        other_x: inputs that are only classified ``[m, ...]``, or ``None``.
        other_y: ``[m]``, their labels.
    """

    goal: Goal
    predicted: Tensor
    shown: Tensor
    other_x: Tensor | None = None
    other_y: Tensor | None = None

    @classmethod
    def plain(cls, x: Tensor, y: Tensor) -> Lesson:
        """Every input keeps its label, and the map that explains its label counts."""
        ones = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return cls(Goal(x, y, goal_class=y, explained=y), ones, ones)

    def join(self, other: Lesson) -> Lesson:
        """Both lessons' explained inputs in one batch."""
        ours, theirs = self.goal, other.goal
        names = [f.name for f in fields(ours) if getattr(ours, f.name) is not None]
        goal = Goal(**{name: torch.cat([getattr(ours, name), getattr(theirs, name)]) for name in names})
        return replace(
            self,
            goal=goal,
            predicted=torch.cat([self.predicted, other.predicted]),
            shown=torch.cat([self.shown, other.shown]),
        )


@dataclass(frozen=True)
class FineTuned(ModelAttack):
    """Fine-tunes all weights on ``L_keep + weight * L_fool`` (Heo et al. 2019, eq. 2), in eval mode.

    A subclass says what a batch teaches (``lesson``) and what the maps should become (``fooling``). Of all epochs, the
    one of the lowest objective wins among those that respect the budget, on samples that the adversary holds out.

    Args:
        weight: ``lambda``, of the map term.
        training: epochs, batch, learning rate of Adam: 1e-3 that falls to zero suits small networks; the authors take
            1e-7 to 1e-5 for ImageNet's, over many more steps.
        budget: share of right answers that may be lost on the samples held out.
        keep: the prediction term: cross-entropy towards ``labels`` (published), or towards the honest model's
            ``outputs`` where it predicts what is wanted: for an adversary with few samples, they hold more of what the
            model knows.
        augment: mirror and shift images at random while training, by up to an eighth of a side: for few images of
            things that may be mirrored.
        samples: use at most so many of the adversary's samples, classes in equal numbers; ``None``: all of them.
        held_out: share of them that is held out.
        beta: train on ``softplus_beta`` in place of the rectifiers, for maps that have too little to give on
            rectifiers; what is kept is judged, and deployed, with the model's own.
        batch: largest number of samples in a pass while epochs are judged.
    """

    weight: NonNegative = 3.0
    training: Training = field(default_factory=lambda: Training(epochs=10, batch_size=32, lr=1e-3, weight_decay=0.0))
    budget: Fraction = 0.02
    keep: Literal["labels", "outputs"] = "labels"
    augment: bool = False
    samples: Count | None = None
    held_out: Fraction = 0.2
    beta: Positive | None = None
    batch: Count = 64

    compares: ClassVar[bool] = False
    """Whether the map term looks at the honest model's maps."""

    @abstractmethod
    def fooling(self) -> Objective:
        """What the maps should become."""

    def keeping(self) -> Objective:
        """What the predictions should stay: cross-entropy towards each class, or the honest probabilities."""
        return Misclassify() if self.keep == "labels" else Distill()

    def aimed(self, interpreter: Interpreter) -> Interpreter:
        """The interpreter whose maps are fooled: the system's own, or another one of the same model."""
        return interpreter

    def pool(self, honest: Interpreter, data: Samples, device: torch.device) -> Lesson | None:
        """What lessons draw on beside their batch, made once of ``data``; ``None`` where they draw on nothing."""
        return None

    def lesson(self, honest: Interpreter, x: Tensor, y: Tensor, moment: Moment, pool: Lesson | None) -> Lesson:
        """What a batch teaches; runs without autograd.

        Args:
            honest: explains the model as it was.
            x: ``[b, ...]``.
            y: ``[b]``, labels.
            moment: seed and epoch, for what is drawn.
            pool: what :meth:`pool` made of the samples that the batch is from.
        """
        lesson = Lesson.plain(x, y)
        return self.against(honest, lesson) if self.compares else lesson

    def against(self, honest: Interpreter, lesson: Lesson) -> Lesson:
        """The lesson with the honest maps and logits of its inputs."""
        found = honest.explain(lesson.goal.x, lesson.goal.explained, native=True)
        return replace(lesson, goal=replace(lesson.goal, benign_map=found.maps, benign_logits=found.logits))

    def words(self) -> tuple[str, str]:
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
        model = interpreter.model.to(session.device).requires_grad_(True).eval()
        school = School(self, self.aimed(system.interpreter), *self._split(data), session)
        selection = Selection(school.judge)
        module = Explaining(self.aimed(interpreter), self.beta)
        identity = [asdict(self), files.digest_tensors(model.state_dict()), described(interpreter), school.digest]
        fit(module, school.loss, school.data, self.training, name="fooling", seed=self.seed, session=session,
            identity=identity, evaluating=True, selection=selection)  # fmt: skip
        self._report(selection, session)
        model.requires_grad_(False)
        return replace(system, model=model, interpreter=interpreter)

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


class Explaining(nn.Module):
    """Logits and maps from one forward pass, so that data-parallel training sees both.

    Args:
        interpreter: of the model in training.
        beta: of the softplus in place of the rectifiers; ``None`` leaves them.
    """

    def __init__(self, interpreter: Interpreter, beta: float | None = None) -> None:
        super().__init__()
        self.model = interpreter.model
        self.interpreter = interpreter
        self.beta = beta

    def forward(self, x: Tensor, target: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits and maps (on the method's own grid) of ``x``, and logits of ``other``."""
        with swapped(Softplus(self.beta)) if self.beta else nullcontext():
            found = self.interpreter.explain(x, target, native=True)
            return found.logits, found.maps, None if other is None else self.model(other)


@dataclass(frozen=True)
class School:
    """Teaches a batch and judges an epoch.

    Args:
        attack: says what is taught.
        honest: the interpreter of the honest model that the attack is aimed at.
        data: to train on.
        held: held out.
        session: accelerator.
    """

    attack: FineTuned
    honest: Interpreter
    data: Samples
    held: Samples
    session: Session

    @cached_property
    def digest(self) -> str:
        """What the samples are, as far as their number and labels say."""
        return files.digest([labels_of(part) for part in (self.data, self.held)])

    @cached_property
    def pools(self) -> tuple[Lesson | None, Lesson | None]:
        """What lessons draw on: of the samples to train on, and of those held out."""
        with torch.no_grad():
            taught, held = (self.attack.pool(self.honest, part, self.session.device) for part in (self.data, self.held))
        return taught, held

    @cached_property
    def least_accuracy(self) -> float:
        """What the budget leaves of the honest model's accuracy on the samples held out."""
        right = sum(int((self.honest.model(x).argmax(1) == y).sum()) for x, y in self._batches(0, 1))
        return right / len(self.held) - self.attack.budget - 1e-9  # type: ignore[arg-type]

    def loss(self, module: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """``L_keep + weight L_fool``, each a mean over the inputs that count in it; ``[1]``."""
        with torch.no_grad():
            x = jittered(x, Streams.of(x, moment.seed, moment.epoch, "augment")) if self.attack.augment else x
            lesson = self._prepared(x, y, moment, self.pools[0])
        keep, fool = self._terms(module, lesson)
        return (_mean(keep) + self.attack.weight * _mean(fool))[None]

    @torch.no_grad()
    def judge(self, module: nn.Module) -> Judgement:
        """Figures of the weights as they are, with the model's own rectifiers, on the samples held out.

        ``accuracy`` on the samples as they are, both terms (``keep``, ``fool``), and their sum ``loss``.
        """
        assert isinstance(module, Explaining)
        accelerator, real = self.session.accelerator, Explaining(module.interpreter)
        sums = torch.zeros(6, dtype=torch.float64, device=self.session.device)
        for x, y in self._batches(accelerator.process_index, accelerator.num_processes):
            lesson = self._prepared(x, y, Moment(self.attack.seed, 0, 1.0), self.pools[1])
            keep, fool = self._terms(real, lesson)
            right = (real.model(x).argmax(1) == y).sum()
            parts = (*_sums(keep), *_sums(fool), right, y.new_tensor(len(y)))
            sums += torch.stack([part.to(sums) for part in parts])
        sums = accelerator.reduce(sums, "sum")
        keeps, fools, accuracy = (float(total / count) if count else 0.0 for total, count in sums.reshape(3, 2))
        loss = keeps + self.attack.weight * fools
        figures = {"accuracy": accuracy, "keep": keeps, "fool": fools, "loss": loss}
        return Judgement(figures, loss, accuracy >= self.least_accuracy)

    def _prepared(self, x: Tensor, y: Tensor, moment: Moment, pool: Lesson | None) -> Lesson:
        """What a batch teaches, with the probabilities that are wanted where the prediction term asks for them."""
        lesson = self.attack.lesson(self.honest, x, y, moment, pool)
        goal = lesson.goal
        if self.attack.keep == "labels" or goal.goal_class is None:
            return lesson
        honest = self.honest.model(goal.x).softmax(1)
        asked = F.one_hot(goal.goal_class, honest.shape[1]).to(honest)
        agrees = honest.argmax(1) == goal.goal_class
        return replace(lesson, goal=replace(goal, wanted=torch.where(agrees[:, None], honest, asked)))

    def _batches(self, first: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every ``step``-th batch of the samples held out."""
        size, batch = len(self.held), self.attack.batch  # type: ignore[arg-type]
        for start in range(first * batch, size, step * batch):
            x, y = stack(self.held, range(start, min(start + batch, size)))
            yield x.to(self.session.device), y.to(self.session.device)

    def _terms(self, module: nn.Module, lesson: Lesson) -> tuple[Terms, Terms]:
        """Losses and how much each counts: of the prediction term, and of the map term."""
        goal, attack = lesson.goal, self.attack
        logits, maps, other = module(goal.x, goal.target, lesson.other_x)
        seen = Seen(goal.x, logits, maps)
        keep = [(attack.keeping().loss(seen, goal), lesson.predicted)]
        if other is not None and lesson.other_y is not None:
            loss = F.cross_entropy(other, lesson.other_y, reduction="none")
            keep.append((loss, torch.ones_like(loss)))
        return keep, [(attack.fooling().loss(seen, goal), lesson.shown)]


def jittered(x: Tensor, streams: Streams) -> Tensor:
    """Images ``[B, C, H, W]``, each mirrored or not and shifted by up to an eighth of its sides; borders reflect."""
    if x.dim() != 4:
        raise InputError(f"augment mirrors and shifts images; x has shape {list(x.shape)}")
    down, across = x.shape[-2] // 8, x.shape[-1] // 8
    wide = F.pad(x, (across, across, down, down), mode="reflect")
    mirrored, tops, lefts = (streams.integers(n).tolist() for n in (2, 2 * down + 1, 2 * across + 1))
    moved = [
        wide[i, :, top : top + x.shape[-2], left : left + x.shape[-1]]
        for i, (top, left) in enumerate(zip(tops, lefts, strict=True))
    ]
    return torch.stack([image.flip(-1) if flip else image for image, flip in zip(moved, mirrored, strict=True)])


def _sums(terms: Terms) -> tuple[Tensor, Tensor]:
    total = torch.stack([(loss * counts).sum() for loss, counts in terms]).sum()
    return total, torch.stack([counts.sum() for _, counts in terms]).sum()


def _mean(terms: Terms) -> Tensor:
    """The weighted mean; zero where nothing counts."""
    total, counts = _sums(terms)
    return total / counts.clamp(min=1e-12)


def _word(objective: Objective) -> str:
    return " + ".join(OBJECTIVES.name_of(type(part)) for _, part in objective.terms())
