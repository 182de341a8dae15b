"""What detectors that are trained share: the attacked inputs that they see, a small network, its training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain.attacks import Attack, random_classes
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import identified
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Interpreter
from robustexplain.models import ModelSpec
from robustexplain.random_streams import derive
from robustexplain.registry import ATTACKS, PARTS
from robustexplain.rounding import like_weights
from robustexplain.schema import make
from robustexplain.system import System
from robustexplain.training import Session, Training, TrainingStep, fit

from ..base import Defense


class NamedAttack:
    """How a recipe writes the attack that a detector is trained on: ``{name: pgd, eps: 0.1}``, or a name alone."""

    @classmethod
    def from_entry(cls, entry: Any, path: str) -> Attack:
        """The attack that ``entry`` describes.

        Raises:
            InputError: an unknown name, or a setting that the attack does not have.
        """
        if isinstance(entry, Attack):
            return entry
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError(f"{path}: an attack's name, or a mapping with a name, is needed, got {entry!r}")
        try:
            build: Any = ATTACKS.get(entry["name"]).build
        except InputError as error:
            raise InputError(f"{path}.name: {error}") from None
        made: Attack = make(build, {key: value for key, value in entry.items() if key != "name"}, path)
        return made


def check_attack(defense: Defense, attack: object, name: str = "attack") -> None:
    """Refuse what gives no inputs of another class to train on.

    Raises:
        FieldError: no attack, one that keeps the prediction, or one that must be fitted first.
    """
    owner = type(defense).__name__
    if not isinstance(attack, Attack):
        raise FieldError(owner, name, f"must be an attack, got {attack!r:.80}")
    if attack.keeps_prediction:
        raise FieldError(owner, name, f"must change the prediction, and {type(attack).__name__} keeps it")
    if attack.needs_data:
        raise FieldError(owner, name, f"must need no fit, and {type(attack).__name__} is fitted on data first")


def images_only(defense: Defense, shape: tuple[int, ...]) -> str | None:
    """Why a detector of images cannot watch inputs of ``shape``, without the batch; ``None`` where it can."""
    if len(shape) == 3:
        return None
    return f"{defense.name} watches images [C, H, W]; a sample has shape {list(shape)}"


def refuse_misfit(defense: Defense, x: Tensor) -> None:
    """Refuse training inputs that the defense has no use for.

    Raises:
        InputError: with what :meth:`Defense.misfit` says of their shape.
    """
    why = defense.misfit(tuple(x.shape[1:]))
    if why is not None:
        raise InputError(why)


def attack_in_batches(attack: Attack, system: System, x: Tensor, y: Tensor, size: int, seed: int) -> Tensor:
    """Attacked inputs, each towards a random class, in batches of ``size``."""
    with torch.no_grad():
        num_classes = answer(system.model, x[:1]).shape[1]
    goal = random_classes(x, y, num_classes, derive(seed, "goals"))
    parts = zip(x.split(size), y.split(size), goal.split(size), strict=True)
    return torch.cat([attack.inputs(system, *part) for part in parts])


@torch.no_grad()
def deceiving(model: nn.Module, x: Tensor, attacked: Tensor, size: int) -> Tensor:
    """The attacked inputs that ``model`` answers otherwise than ``x``, ``[N, ...]``: repeated until they are as many.

    Raises:
        InputError: there is none.
    """
    before, after = (torch.cat([answer(model, p).argmax(1) for p in part.split(size)]) for part in (x, attacked))
    rows = (before != after).nonzero()[:, 0]
    if not len(rows):
        raise InputError(
            f"the attack that the detector is trained on changed the prediction of none of {len(attacked)} inputs: "
            "give it a larger eps or more steps"
        )
    return attacked[rows[torch.arange(len(attacked), device=rows.device) % len(rows)]]


def seen_attacked(attack: Attack, system: System, x: Tensor, y: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clean inputs and as many that ``attack``, adapted to ``system``, deceives it with; and labels, 1 is attacked."""
    made = deceiving(system.model, x, attack_in_batches(attack.adapted(system), system, x, y, size, seed), size)
    return torch.cat([x, made]), torch.cat([torch.zeros(len(x)), torch.ones(len(made))]).long()


@PARTS.register("feature-network")
class FeatureNetwork(nn.Module):
    """Logistic regression, or a network of one hidden layer, on standardised features ``[B, F]``; one logit ``[B]``."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, hidden: int = 0) -> None:
        super().__init__()
        self.spec = ModelSpec("feature-network", {"features": features, "hidden": hidden})
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        wide = nn.Sequential(nn.Linear(features, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.layers = nn.Sequential(wide, nn.Linear(hidden or features, 1))

    @torch.no_grad()
    def standardising(self, features: Tensor) -> FeatureNetwork:
        """Itself, with mean and deviation of ``features`` ``[N, F]``; a constant feature is only centred."""
        self.mean.copy_(features.mean(0))
        spread = features.std(0, correction=0)
        self.std.copy_(torch.where(spread > 0, spread, 1))
        return self

    def forward(self, features: Tensor) -> Tensor:
        """``[B]`` logits; above 0 is attacked."""
        features = like_weights(features, self)
        logits: Tensor = self.layers((features - self.mean) / self.std)[:, 0]
        return logits


def seeded(build: type[nn.Module], options: dict[str, Any], seed: int) -> Any:
    """``build(**options)`` with random weights of ``seed``; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "network"))
        return build(**options)


def learned(
    network: nn.Module,
    seen: Tensor,
    labels: Tensor,
    defense: Any,
    system: System,
    source: tuple[Tensor, Tensor],
    session: Session,
    *,
    name: str = "",
    interpreters: tuple[Interpreter, ...] = (),
) -> Any:
    """``network`` trained to tell attacked from clean by what it sees of them; its weights frozen.

    Args:
        network: one logit ``[B]`` for what it sees.
        seen: ``[N, ...]``.
        labels: ``[N]``, 1 is attacked.
        defense: its ``training`` and ``seed`` are used, and its settings identify the training.
        system: whose model ``seen`` was computed from.
        source: inputs and labels that ``seen`` was computed from: a checkpoint is compared by these.
        session: accelerator, checkpoints, progress.
        name: of the checkpoint; default the defense's.
        interpreters: whose maps ``seen`` was computed from.
    """
    # Not what is seen: maps differ in last bits between kinds of machine and numbers of threads.
    identity: list[object] = [
        identified(defense),
        digest_tensors({"labels": labels, "y": source[1], **system.model.state_dict()}),
        [interpreter.described() for interpreter in interpreters],
        [weights_of(interpreter) for interpreter in interpreters],
    ]
    settings: Training = defense.training
    fit(network, binary_loss, TensorDataset(seen.cpu(), labels.cpu()), settings, name=name or defense.name,
        seed=defense.seed, session=session, identity=identity, source=TensorDataset(*source))  # fmt: skip
    return network.requires_grad_(False)


def weights_of(interpreter: Interpreter) -> list[object]:
    """Hashes of the weights of an interpreter's networks, and of those that it is made of."""
    own = [value for value in vars(interpreter).values() if isinstance(value, nn.Module)]
    return [*(digest_tensors(net.state_dict()) for net in own), *map(weights_of, interpreter.parts)]


def binary_loss(module: nn.Module, seen: Tensor, labels: Tensor, step: TrainingStep) -> Tensor:
    """Binary cross-entropy of one logit for each of what is seen, ``[b]``."""
    return nn.functional.binary_cross_entropy_with_logits(module(seen), labels.float(), reduction="none")
