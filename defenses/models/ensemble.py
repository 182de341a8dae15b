"""Ensemble adversarial training: inputs attacked against other networks that do not change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from robustexplain import models
from robustexplain.attacks.inner import attacked
from robustexplain.data import stack
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import identified
from robustexplain.files import digest_tensors
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES, MODELS
from robustexplain.training import Samples, Session, Training, TrainingStep, cross_entropy, eval_mode, fit
from robustexplain.training.losses import classification_loss, right

from .base import ModelDefense, begun
from .fine_tuned import refuse_no_room, weights_in_training
from .inner_attacks import RandomFGSM


@DEFENSES.register("ensemble-at", paper="Tramèr et al. 2018, section 4", needs=("data",))
@dataclass(frozen=True)
class EnsembleAdversarialTraining(ModelDefense):
    """Fine-tune the classifier on clean inputs and on such as were attacked against a network drawn for each step.

    It is one of several other networks, whose weights stay as they are, or the classifier itself, with equal chances
    (Tramèr et al. 2018, section 4). Both halves of a step count alike. As in the authors' code the attack leads away
    from the class that the attacked network predicts, so that the label does not leak into the input.

    Args:
        static: names of the other networks' architectures, each trained here on the same data; a name may stand there
            twice, for other weights.
        static_training: of each of them.
        networks: trained networks to use besides, from Python: ``[0, 1]`` images to logits of the same classes. Each
            is in eval mode meanwhile, and in its own mode afterwards.
        attack: R+FGSM; by default with the paper's ``eps`` for ImageNet and its ``alpha`` of ``eps / 2``.
        training: epochs, batch, optimiser of the classifier.
        fresh: begin with random weights instead of the system's own; for models that ``robustexplain.models`` builds.

    Raises:
        FieldError: an ``eps`` of 0, or no other network.
        UnknownNameError: an architecture that there is not.
        InputError: a network that answers with other classes, or takes no images.
    """

    static: Sequence[str] = ("small-cnn", "small-resnet")
    static_training: Training = field(default_factory=Training)
    networks: Sequence[nn.Module] = field(default=(), repr=False, metadata={"recipe": False})
    attack: RandomFGSM = field(default_factory=RandomFGSM)
    training: Training = field(default_factory=Training)
    fresh: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if isinstance(self.static, str):
            raise FieldError(name, "static", f"must be a list of names, got {self.static!r}")
        object.__setattr__(self, "static", tuple(self.static))
        object.__setattr__(self, "networks", tuple(self.networks))
        if not self.static and not self.networks:
            raise FieldError(name, "static", "must name one at least, where no networks are handed in")
        for each in self.static:
            if each.partition(":")[0] not in models.loading.PREFIXES:
                MODELS.get(each)
        refuse_no_room(self, self.attack, "attack")

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        weights_in_training(self.name, model, self.training)
        given = tuple(network.to(session.device) for network in self.networks)
        with ExitStack() as modes:
            for network in given:
                modes.enter_context(eval_mode(network))
            return self._hardened_by(given, model, data, session)

    def _hardened_by(
        self, given: tuple[nn.Module, ...], model: nn.Module, data: Samples, session: Session
    ) -> nn.Module:
        """The model trained in place; ``given`` are the networks handed in, in eval mode."""
        start = begun(model, self.fresh, self.seed)
        sources = (*given, *self._trained(model, data, session))
        settings = {f.name: identified(getattr(self, f.name)) for f in fields(self) if f.name != "networks"}
        known = [settings, start, *(digest_tensors(network.state_dict()) for network in given)]
        loss = EnsembleLoss(self.attack, model, sources)
        return fit(model, loss, data, self.training, name="ensemble-at", seed=self.seed, session=session,
                   identity=known)  # fmt: skip

    def _trained(self, model: nn.Module, data: Samples, session: Session) -> list[nn.Module]:
        """The other networks, the ones to be trained among them trained; all are checked before."""
        x = stack(data, range(1))[0].to(session.device)
        with torch.no_grad():
            classes = answer(model.eval(), x).shape[1]
            for network in self.networks:
                own = answer(network, x).shape[1]
                if own != classes:
                    raise InputError(
                        f"a network to attack answers with {own} classes, and the classifier with {classes}"
                    )
        seeds = [derive(self.seed, "static", i) % 2**32 for i in range(len(self.static))]
        made = [
            models.build(name, seed=seed, num_classes=classes, in_channels=x.shape[1])
            for name, seed in zip(self.static, seeds, strict=True)
        ]
        trained = identified(self.static_training)
        for i, network in enumerate(made):
            fit(network, cross_entropy, data, self.static_training, name=f"ensemble-at-static-{i + 1}",
                seed=seeds[i], session=session, identity=[self.static[i], trained])  # fmt: skip
        return [network.requires_grad_(False) for network in made]


@dataclass(frozen=True)
class EnsembleLoss:
    """The mean cross-entropy of clean and attacked inputs, ``[b]``.

    Args:
        attack: in training.
        model: the network in training, unwrapped.
        sources: the other networks that are attacked.
        label_smoothing: share of the label's probability that is distributed over all classes.
    """

    attack: RandomFGSM
    model: nn.Module
    sources: tuple[nn.Module, ...]
    label_smoothing: float = 0.0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the model, perhaps wrapped for data-parallel training."""
        found = module(torch.cat([x, self.attacked(x, step)]))
        return torch.stack(classification_loss(found, torch.cat([y, y]), self.label_smoothing).chunk(2)).mean(0)

    def smoothed(self, label_smoothing: float) -> EnsembleLoss:
        """The same loss with label smoothing."""
        return replace(self, label_smoothing=label_smoothing)

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy`` and, on inputs attacked against one of the networks, ``transfer_accuracy``."""
        return {"accuracy": right(module(x), y), "transfer_accuracy": right(module(self.attacked(x, step)), y)}

    def attacked(self, x: Tensor, step: TrainingStep) -> Tensor:
        """Inputs ``[b, C, H, W]`` attacked against the step's network."""
        network = self.source(step)
        with torch.no_grad(), eval_mode(network):
            predicted = answer(network, x).argmax(1)
        return attacked(self.attack, network, x, predicted, step)

    def source(self, step: TrainingStep) -> nn.Module:
        """The network that is attacked: the same for every sample of a step, in every process."""
        pool = (self.model, *self.sources)
        return pool[derive(step.seed, "source", step.number) % len(pool)]
