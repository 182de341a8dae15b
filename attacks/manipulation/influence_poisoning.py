"""Training images changed within a ball, so that the last layer trained on them errs on a chosen input."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain import files
from robustexplain.checks import Kind
from robustexplain.data import stack, subset, take
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError, NotDifferentiableError
from robustexplain.fields import Count, Fraction, Natural, Positive
from robustexplain.interpreters import Interpreter
from robustexplain.metrics import Pearson
from robustexplain.objectives import DropTopK, Goal, Observation
from robustexplain.random_streams import generator
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import System
from robustexplain.training import Samples, Session

from .base import Manipulation
from .last_layer import LastLayer, fitted, influence, solved

HISTORY = "poisoning.json"
"""File beside checkpoints: what was poisoned, and the figures of each round."""


class Round(NamedTuple):
    """The victims after a retraining of the last layer.

    Args:
        loss: their mean cross-entropy towards the labels.
        wrong: share of them whose prediction is not that of the cleanly trained layer.
        likeness: mean correlation of their maps with those of the cleanly trained layer, of the same class.
    """

    loss: float
    wrong: float
    likeness: float


class Poisoned(NamedTuple):
    """What the poisoning did.

    Args:
        system: with the last layer trained on the poisoned samples.
        clean: with the last layer trained on the clean ones.
        rows: ``[n]``, which samples are poisoned.
        x: ``[n, ...]``, what they became.
        history: clean training, then every round; the last one is that of ``system``.
    """

    system: System
    clean: System
    rows: Tensor
    x: Tensor
    history: tuple[Round, ...]


@MANIPULATIONS.register(
    "influence-poisoning", paper="Koh & Liang 2017, section 5.2, and code", needs=("gradients", "data")
)
@dataclass(frozen=True)
class InfluencePoisoning(Manipulation):
    """Poisons a few training images by their influence on a victim, and trains the last layer again.

    ``z_i <- P(z_i - step * sign(grad_x [s^T grad_W L(z_i)]))`` with ``s = H^-1 grad_W L(victim)``, the layer trained to
    convergence in every round; all before the last layer is frozen, as in the paper. The images are those of largest
    gradient. ``aim: map`` lowers the share of the victim's map on the clean map's top pixels (Ghorbani et al. 2019) in
    place of raising its loss, and takes the best round that keeps its prediction. Departures: ``P`` is a ball of
    ``eps`` (the paper: what rounds to the same 8 bits, which is ``eps = 0.5 / 255``); several classes; the bias is
    decayed, too.

    Args:
        aim: what of the victim is to change: its prediction, or its map.
        victim: which of the adversary's samples is the victim; the layer is not trained on it.
        images: training images that are changed.
        eps: by how much, each value in ``[0, 1]``.
        step: of a round; ``None``: a tenth of ``eps``.
        rounds: at most; a changed prediction ends them.
        by: ``random`` is the control: the same images and the same steps, along signs drawn once.
        decay: weight decay of the layer, ``decay / 2 |W|^2``.
        samples: largest number of the adversary's samples that are used, classes in equal numbers; ``None``: all.
        batch_size: images in a pass.
    """

    aim: Literal["prediction", "map"] = "prediction"
    victim: Natural = 0
    images: Count = 10
    eps: Fraction = 8 / 255
    step: Positive | None = None
    rounds: Count = 50
    by: Literal["influence", "random"] = "influence"
    decay: Positive = 1e-3
    samples: Count | None = None
    batch_size: Count = 64

    changes: ClassVar[str] = "training images"
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps:
            raise FieldError(type(self).__name__, "eps", "must be above 0: no image would change")

    def _manipulate(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # checked before; for the type checker
        if self.victim >= len(data):
            raise FieldError(type(self).__name__, "victim", f"must be below the {len(data)} samples, got {self.victim}")
        x, y = (part.to(session.device) for part in stack(data, range(self.victim, self.victim + 1)))
        others = subset(data, [i for i in range(len(data)) if i != self.victim])
        if not len(others):
            raise InputError(f"{type(self).__name__} needs samples beside the victim")
        found = self.poison(system, others, x, y)
        if session.folder is not None and session.accelerator.is_main_process:
            figures = [dict(r._asdict()) for r in found.history]
            files.write_json(session.folder / HISTORY, {"rows": found.rows.tolist(), "rounds": figures})
        return found.system

    def poison(self, system: System, data: Samples, x: Tensor, y: Tensor) -> Poisoned:
        """The poisoned system, with the images and the figures of each round.

        Args:
            system: stays as it is.
            data: the training samples of the last layer.
            x: the victims ``[V, C, H, W]``; their mean is attacked.
            y: their labels ``[V]``.

        Raises:
            NotDifferentiableError: ``aim: map`` at a method without a gradient.
            UnsupportedModelError: no linear layer gives the logits.
        """
        if self.aim == "map" and not system.interpreter.differentiable:
            raise NotDifferentiableError(
                f"aim: map follows the map's gradient, and {type(system.interpreter).__name__} has none"
            )
        if self.samples is not None and self.samples < len(data):
            data = take(data, self.samples, self.seed)
        return _Search(self, system, data, x, y).run()

    def summaries(self) -> tuple[str, str]:
        """What the attack changes and what it aims at."""
        return self.changes, f"{self.aim} of one input"


@dataclass
class _Search:
    """The rounds of a poisoning.

    Args:
        attack: the settings.
        system: the honest one.
        data: training samples.
        x: victims.
        y: their labels.
    """

    attack: InfluencePoisoning
    system: System
    data: Samples
    x: Tensor
    y: Tensor
    maps: Tensor = field(init=False)
    predicted: Tensor = field(init=False)

    def __post_init__(self) -> None:
        at = self.x.device
        self.clean_x, self.labels = (part.to(at) for part in stack(self.data))
        self.interpreter = copy.deepcopy(self.system.interpreter)
        self.interpreter.model.to(at).requires_grad_(False).eval()
        self.last = LastLayer(self.interpreter.model, self.x)
        with torch.no_grad():
            self.read = torch.cat([self.last.features(part) for part in self.clean_x.split(self.attack.batch_size)])

    def run(self) -> Poisoned:
        """Choose images, step and retrain, until the victims' predictions are others."""
        attack, history = self.attack, []
        self._retrain()
        clean = self._deployed()
        with torch.no_grad():
            self.predicted = answer(self.interpreter.model, self.x).argmax(1)
            self.maps = self._explained(self.interpreter)
        rows = self._chosen()
        start, now = self.clean_x[rows], self.clean_x[rows]
        history.append(self._round())
        best, kept = self.last.weights, (now, history[0])
        step = attack.eps / 10 if attack.step is None else attack.step
        drawn = self._drawn(start)
        for _ in range(attack.rounds):
            signs = self._gradients(now, self.labels[rows], self._aim()).sign() if drawn is None else drawn
            now = torch.clamp(now - step * signs, start - attack.eps, start + attack.eps).clamp(0, 1)
            with torch.no_grad():
                self.read[rows] = self.last.features(now)
            self._retrain()
            history.append(self._round())
            if self._better(history[-1], kept[1]):
                best, kept = self.last.weights, (now, history[-1])
            if attack.aim == "prediction" and history[-1].wrong == 1:
                break
        self.last.put(best)
        return Poisoned(self._deployed(), clean, rows, kept[0], (*history[:-1], kept[1]))

    def _better(self, found: Round, best: Round) -> bool:
        if self.attack.aim == "map":
            return found.wrong == 0 and found.likeness < best.likeness
        return (found.wrong, found.loss) > (best.wrong, best.loss)

    def _retrain(self) -> None:
        self.last.put(fitted(self.read, self.labels, self.attack.decay, self.last.weights))

    def _deployed(self) -> System:
        interpreter = copy.deepcopy(self.interpreter)
        stale = self.system.detector is not None  # it was fitted to the honest model
        return replace(self.system, model=interpreter.model, interpreter=interpreter, stale_detector=stale)

    def _explained(self, interpreter: Interpreter) -> Tensor:
        return interpreter.explain(self.x, self.predicted, native=True).maps

    @torch.no_grad()
    def _round(self) -> Round:
        logits = answer(self.interpreter.model, self.x)
        wrong = (logits.argmax(1) != self.predicted).float().mean()
        likeness = torch.nan_to_num(Pearson()(self._explained(self.interpreter), self.maps)).mean()
        return Round(float(F.cross_entropy(logits, self.y)), float(wrong), float(likeness))

    def _aim(self) -> Tensor:
        """``H^-1`` times the gradient, in the last layer's weights, of what is to rise."""
        self.last.layer.requires_grad_(True)
        with torch.enable_grad():
            if self.attack.aim == "map":
                goal = Goal(self.x, self.y, benign_map=self.maps)
                logits = answer(self.interpreter.model, self.x)
                seen = Observation(self.x, logits, self._explained(self.interpreter))
                loss = -DropTopK().loss(seen, goal).mean()
            else:
                loss = F.cross_entropy(answer(self.interpreter.model, self.x), self.y)
            gradient = self.last.gradient(loss)
        self.last.layer.requires_grad_(False)
        return solved(self.read, self.last.weights, self.attack.decay, gradient)

    def _gradients(self, x: Tensor, y: Tensor, aim: Tensor) -> Tensor:
        """``grad_x`` of each image's influence: against it the victims' loss rises."""
        found = []
        for part, labels in zip(x.split(self.attack.batch_size), y.split(self.attack.batch_size), strict=True):
            given = part.clone().requires_grad_()
            with torch.enable_grad():
                total = influence(self.last.features(given), labels, self.last.weights, aim).sum()
            found.append(torch.autograd.grad(total, given)[0])
        return torch.cat(found)

    def _chosen(self) -> Tensor:
        """``[n]``: the images whose change matters most: the largest gradient, summed over pixels (the code)."""
        size = self._gradients(self.clean_x, self.labels, self._aim()).abs().flatten(1).sum(1)
        return size.topk(min(self.attack.images, len(size))).indices

    def _drawn(self, x: Tensor) -> Tensor | None:
        """The signs of the control, or ``None``."""
        if self.attack.by == "influence":
            return None
        draws = torch.rand(x.shape, generator=generator(self.attack.seed, "random signs"))
        return (draws - 0.5).sign().to(x)
