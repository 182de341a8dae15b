"""Black-box transfer attack: train a substitute on the system's predictions and attack the substitute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from robustexplain import checks
from robustexplain import maps as ops
from robustexplain.door import admit, answer
from robustexplain.errors import InputError
from robustexplain.fields import Count, Positive
from robustexplain.interpreters import InterpreterSpec
from robustexplain.models import build
from robustexplain.objectives import Goal, Objective
from robustexplain.objectives.confident import away
from robustexplain.random_streams import Streams, generator
from robustexplain.registry import ATTACKS
from robustexplain.system import System
from robustexplain.training import Session, Training, TrainingStep, fit

from ..base import Attack
from ..joint.adv2 import ADV2
from ..search.loop import Plan, SearchResult
from ..threat import Threat
from .gradient import PGD

Answers = Literal["label", "probability"]


class _IndexedImages(Dataset[tuple[Tensor, int]]):
    """Images, each with its index."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index


@dataclass(frozen=True)
class _Transferred(Plan):
    """Inputs attacked on the substitute, given to the system unchanged."""

    attack: Attack
    substitute: System

    @property
    def inner(self) -> Plan:
        return self.attack.plan(self.substitute)

    @property
    def threat(self) -> Threat:  # type: ignore[override]
        return self.inner.threat

    @property
    def aim(self) -> Objective:
        return self.inner.aim

    @property
    def summary(self) -> str:
        return f"{type(self.attack).__name__} on a substitute"

    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        weights = next(self.substitute.model.parameters())
        if weights.dtype != goal.x.dtype or weights.device != goal.x.device:
            raise InputError(
                f"the substitute was fitted on {weights.dtype} images on {weights.device}, "
                f"x has {goal.x.dtype} on {goal.x.device}"
            )
        wanted = None if goal.goal_map is None else ops.resize(goal.goal_map, goal.x.shape[-2:])
        found = self.attack(self.substitute, goal.x, goal.label, goal.goal_class, wanted)
        return SearchResult(
            x=found.x,
            queries=torch.zeros_like(goal.label),
            zero_direction=found.zero_direction,
            stalled=found.stalled,
            surrogate_misled=found.surrogate_misled,
        )


@dataclass(frozen=True)
class FittedSubstitute(Attack):
    """A :class:`Substitute` with its trained substitute; made by :meth:`Substitute.fitted`.

    Args:
        attack: the attack on the substitute.
        substitute: the attacked substitute system.
        spent: queries to the real system for training, once for all samples. The attack itself makes none, so
            ``Attacked.queries`` is 0.
    """

    attack: Attack
    substitute: System
    spent: int

    @property
    def needs_maps(self) -> bool:  # type: ignore[override]
        """Whether the attack on the substitute uses maps; if so, the goal is made from the real system's maps."""
        return self.attack.needs_maps

    def differentiates(self, system: System) -> bool:
        """Never: it uses gradients of the substitute only."""
        return False

    def plan(self, system: System) -> Plan:
        """The attack on the substitute."""
        return _Transferred(self.attack, self.substitute)


@ATTACKS.register("substitute", paper="Papernot et al. 2017, Algorithm 1, section 4; Papernot et al. 2016, section 3")
@dataclass(frozen=True)
class Substitute(Attack):
    """Trains a substitute network on the system's predictions and attacks it: no gradient of the system, few queries.

    The system is queried on the adversary's images and a network is trained on its answers. New images are made by a
    step along the sign of that network's gradient at the answer, ``x + lambda_rho sgn(J[O(x)])``, queried in turn, and
    the training is repeated. The attack must be fitted (:meth:`fitted`) before it runs; the labels of the adversary's
    images are not used. With ``joint`` the substitute gets an interpreter too, whose map should match the deployed
    system's own map (or the given goal map). Departures: new images are clipped to ``[0, 1]``; reservoir sampling is a
    random choice of as many images as the budget allows.

    Args:
        craft: the attack on the substitute.
        joint: an attack on the substitute's prediction and map, instead of ``craft``.
        interpreter: the substitute's, by name.
        model: the substitute's architecture, by name.
        answers: what a query returns: the ``label``, or the ``probability`` of each class.
        rounds: number of trainings; between two of them the number of images doubles (the paper: 6).
        augment_step: ``lambda`` (the paper: 0.1).
        period: ``tau``: after so many rounds the sign of ``lambda`` changes (periodic step size).
        max_queries: largest number of queries to the system.
        training: of one round, which starts from the weights of the previous one.
    """

    craft: PGD = field(default_factory=PGD)
    joint: ADV2 | None = None
    interpreter: str = "gradcam"
    model: str = "small-cnn"
    answers: Answers = "label"
    rounds: Count = 6
    augment_step: Positive = 0.1
    period: Count = 3
    max_queries: Count = 6400
    training: Training = field(default_factory=lambda: Training(epochs=10))

    needs_data: ClassVar[bool] = True

    def differentiates(self, system: System) -> bool:
        """Never: it uses gradients of the substitute only."""
        return False

    def plan(self, system: System) -> Plan:
        """Always an error: the attack must be fitted first.

        Raises:
            InputError: always.
        """
        raise InputError("Substitute has no substitute yet: call fitted(system, x, y) and run what it returns")

    def summaries(self) -> tuple[str, str, str]:
        """Those of the attack on the substitute."""
        threat, aim, _ = self._crafting.summaries()
        return threat, aim, f"{type(self._crafting).__name__} on a substitute"

    @property
    def _crafting(self) -> Attack:
        return self.craft if self.joint is None else self.joint

    def fitted(self, system: System, x: Tensor, y: Tensor) -> FittedSubstitute:
        """Query the system and train the substitute.

        Args:
            system: the deployed system; only its predictions are used.
            x: the adversary's images ``[N, C, H, W]``.
            y: their labels ``[N]``, not used: the system's answers are.

        Raises:
            InputError: bad ``x``, a model in train mode, or several training processes.
        """
        checks.images(x, "a substitute")
        admit(system.model, x)
        session = Session()
        if session.accelerator.num_processes > 1:
            raise InputError("a substitute is trained by one process: attack with substitute in a run of one process")
        rng = generator(self.seed, "substitute")
        pool = x.detach()[torch.randperm(len(x), generator=rng)[: self.max_queries].to(x.device)]
        answers = self._query(system, pool)
        model: nn.Module = build(self.model, num_classes=answers.shape[1], in_channels=x.shape[1], seed=self.seed)
        for number in range(self.rounds):
            model = self._train(model, pool, answers, number, session).to(x.device)
            room = min(self.max_queries - len(pool), len(pool))
            if number == self.rounds - 1 or not room:
                continue
            rows = torch.randperm(len(pool), generator=rng)[:room].to(x.device)
            moved = self._moved(model, pool[rows], answers[rows].argmax(1), number)
            pool, answers = torch.cat([pool, moved]), torch.cat([answers, self._query(system, moved)])
        model = model.to(x.dtype).eval()
        return FittedSubstitute(
            self._crafting, System(model, InterpreterSpec(self.interpreter).build(model)), len(pool), seed=self.seed
        )

    @torch.no_grad()
    def _query(self, system: System, x: Tensor) -> Tensor:
        """The answers to queries ``x``: probabilities, or one-hot labels, ``[N, K]``."""
        logits = torch.cat([answer(system.model, part) for part in x.split(256)]).float()
        if self.answers == "probability":
            return logits.softmax(1)
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()

    def _train(self, model: nn.Module, x: Tensor, answers: Tensor, number: int, session: Session) -> nn.Module:
        answers = answers.to(session.device)

        def loss(module: nn.Module, images: Tensor, places: Tensor, moment: TrainingStep) -> Tensor:
            cross_entropy: Tensor = -(answers[places] * module(images).log_softmax(1)).sum(1)
            return cross_entropy

        images, name = _IndexedImages(x.detach().float().cpu()), f"substitute-{number}"
        # The caller's autocast caches casts of the weights, which change here.
        with torch.autocast(session.device.type, enabled=False):
            return fit(model, loss, images, self.training, name=name, seed=self.seed, session=session)

    def _moved(self, model: nn.Module, x: Tensor, answers: Tensor, number: int) -> Tensor:
        """``x + lambda_rho sgn(J[O(x)])``."""
        size = self.augment_step * (-1) ** (number // self.period)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            leaf = x.detach().float().requires_grad_()
            # A direction also where the substitute is certain of its answer.
            (gradient,) = torch.autograd.grad(away(answer(model, leaf), answers).sum(), leaf)
        moved: Tensor = (x + size * gradient.sign().to(x.dtype)).clamp(0, 1)
        return moved
