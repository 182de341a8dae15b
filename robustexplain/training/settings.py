"""How something is trained: epochs, batches, optimiser, schedule, augmentation, validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import FieldError, InputError
from ..fields import Count, Fraction, Natural, NonNegative, Positive, check_fields
from .augmentation import operation


@dataclass(frozen=True)
class Training:
    """How something is trained.

    Args:
        epochs: passes over the data.
        batch_size: samples an optimiser step, over all processes.
        micro_batch: samples a forward pass; default ``batch_size`` over the number of processes (and over Accelerate's
            ``gradient_accumulation_steps``). Set it to make the result the same on any number of processes that
            divides ``batch_size / micro_batch``.
        lr: peak learning rate.
        weight_decay: decoupled from the gradient for ``adamw``, added to it for ``sgd``.
        schedule: ``one_cycle`` (a linear rise over the first fifth, then a cosine to zero), ``cosine`` (to zero from
            the start), ``steps`` (times ``decay`` at each of ``milestones``) or ``constant``.
        clip: largest norm of the gradient; 0 does not clip.
        workers: processes that load data, for each training process.
        optimizer: ``adamw`` or ``sgd``.
        momentum: of ``sgd``.
        nesterov: whether that momentum looks ahead.
        milestones: shares of all steps, rising, at which ``steps`` lowers the rate.
        decay: what it is multiplied by there.
        augment: random changes of each training image, in this order: ``flip`` (left to right), ``crop-N`` (shifted by
            up to ``N`` pixels, zeros move in), ``rotate-D`` (by up to ``D`` degrees), ``colour-S`` (brightness,
            contrast and saturation times ``1 - S`` to ``1 + S``). Drawn from a stream of the sample's own.
        ema: decay of an exponential moving average of the weights, which training then ends with; 0 keeps none. Over
            the first ``t`` updates it is at most ``(1 + t) / (10 + t)``, so that the initial weights are forgotten.
        label_smoothing: share of the label's probability that is spread over all classes; for classifiers.
        validation: share of the samples that is held out and never trained on; for classifiers. Training then ends
            with the weights of the epoch that is best on them (the first of equals).
        patience: stop after so many epochs without a better one on the samples held out; 0 never stops early.
        freeze: dotted names of modules whose weights stay as they are. They are in eval mode while the rest is trained:
            their batch norms keep their statistics.
        lr_factors: what the learning rate is multiplied by under a dotted name; the longest name that fits counts.
            Kept as sorted pairs.
        class_weights: ``balanced`` weighs each sample's loss by ``n / (K n_y)``, with ``n_y`` of the ``n`` training
            samples of its class and ``K`` classes among them, so that all classes count alike and the mean weight is
            1; for classifiers.
        samples: how many of the samples are used at most, drawn by the seed alone, so that all trainings of one seed
            and the same data use the same ones; default all.

    Raises:
        FieldError: a value out of range, infinite, or of no effect.
    """

    epochs: Count = 10
    batch_size: Count = 64
    micro_batch: Count | None = None
    lr: Positive = 2e-3
    weight_decay: NonNegative = 1e-4
    schedule: Literal["one_cycle", "cosine", "steps", "constant"] = "one_cycle"
    clip: NonNegative = 1.0
    workers: Natural = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Fraction = 0.9
    nesterov: bool = False
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    decay: Fraction = 0.1
    augment: tuple[str, ...] = ()
    ema: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    validation: Fraction = 0.0
    patience: Natural = 0
    freeze: tuple[str, ...] = ()
    lr_factors: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    class_weights: Literal["balanced", None] = None
    samples: Count | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        object.__setattr__(self, "augment", tuple(self.augment))
        check_fields(self)
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise InputError(
                f"Training.micro_batch must divide batch_size, got {self.micro_batch} and {self.batch_size}"
            )
        # Beyond that, the first step overflows inside of the optimiser.
        self._require("lr", self.lr <= 1e6, "must be at most 1e6")
        for name in ("weight_decay", "clip"):
            self._require(name, math.isfinite(getattr(self, name)), "must be finite")
        for name in ("ema", "label_smoothing", "validation"):
            self._require(name, getattr(self, name) < 1, "must be below 1")
        rising = list(self.milestones) == sorted(set(self.milestones))
        self._require("milestones", rising, "must be rising shares")
        self._require("nesterov", not self.nesterov or self.momentum > 0, "needs a momentum above 0")
        self._require("patience", not self.patience or self.validation > 0, "needs samples held out (validation)")
        for name in self.augment:
            operation(name)
        self._check_parts()

    def rate(self, progress: float) -> float:
        """The learning rate at ``progress`` in ``[0, 1]`` of all steps."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "steps":
            return self.lr * self.decay ** sum(progress >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        rise = 0.2
        if progress < rise:
            return self.lr * (0.04 + 0.96 * progress / rise)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))

    @property
    def factors(self) -> dict[str, float]:
        """``lr_factors`` by name."""
        return dict(self.lr_factors)

    def optimizer_of(self, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser of these groups of parameters."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )

    def _check_parts(self) -> None:
        self._require("freeze", not isinstance(self.freeze, str), "must be a list of names")
        object.__setattr__(self, "freeze", tuple(self.freeze))
        for name, factor in self.factors.items():
            good = isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor > 0
            self._require("lr_factors", good, f"must be above 0 for {name!r} (to keep weights, freeze them)")
            self._require("lr_factors", self.lr * factor <= 1e6, f"times lr must be at most 1e6 for {name!r}")
        object.__setattr__(self, "lr_factors", tuple(sorted(self.factors.items())))

    def _require(self, name: str, holds: bool, problem: str) -> None:
        if not holds:
            raise FieldError("Training", name, f"{problem}, got {getattr(self, name)!r}")
