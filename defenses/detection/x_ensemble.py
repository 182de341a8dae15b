"""X-Ensemble: one small network a kind of map says whether it looks attacked; a forest weighs what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import maps as ops
from robustexplain.attacks import PGD, Attack, random_classes
from robustexplain.data import stack
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.metrics import threshold_at
from robustexplain.models import ModelSpec
from robustexplain.models.skops_file import dumped, loaded
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES, DETECTORS, PARTS
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, TrainingStep, fit, frozen

from ..base import Defense
from ..interpreters.aggregated import member_of, resolve


class MapNetwork(nn.Module):
    """A small CNN that looks at one map ``[B, H, W]`` and gives one logit ``[B]``: above 0, it looks attacked."""

    def __init__(self, side: int = 32, width: int = 16) -> None:
        super().__init__()
        self.side, self.width = side, width
        self.spec = ModelSpec("map-network", {"side": side, "width": width})
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """``[B]`` logits; maps are rescaled by their largest magnitude and resized to ``side`` first."""
        seen = ops.resize(ops.absmax(maps), (self.side, self.side))
        logits: Tensor = self.layers(seen[:, None])[:, 0]
        return logits


PARTS.register("map-network")(MapNetwork)


@PARTS.register("forest")
@dataclass(frozen=True, eq=False)
class Forest:
    """scikit-learn's random forest over the networks' logits, stored by skops (no pickle, no code).

    Args:
        forest: a fitted ``RandomForestClassifier`` of two classes; class 1 is attacked.
    """

    forest: Any

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, trees: int, seed: int) -> Forest:
        """Fit to logits ``[N, M]`` and labels ``[N]`` (1 is attacked)."""
        from sklearn.ensemble import RandomForestClassifier

        forest = RandomForestClassifier(trees, min_samples_leaf=3, random_state=seed % 2**32)
        return cls(forest.fit(features.cpu().numpy(), labels.cpu().numpy()))

    def __call__(self, features: Tensor) -> Tensor:
        """``[B]``: the share of trees that say attacked, from logits ``[B, M]``."""
        share = self.forest.predict_proba(features.detach().float().cpu().numpy())[:, 1]
        return torch.from_numpy(np.asarray(share)).to(features.device, torch.float32)

    def to_bytes(self) -> bytes:
        """skops' format."""
        return dumped(self.forest)

    @classmethod
    def from_bytes(cls, content: bytes) -> Forest:
        """Read skops' format; types that are not trusted, and archives that inflate beyond reason, are refused."""
        forest = loaded(content)
        if not hasattr(forest, "predict_proba"):
            raise InputError(f"the stored forest is a {type(forest).__name__}, which gives no probabilities")
        return cls(forest)


@DETECTORS.register("x-ensemble", paper="Wang et al. 2020 (KDD)")
@dataclass(frozen=True, eq=False)
class XEnsembleDetector:
    """A network a kind of map, and a forest over their logits.

    Args:
        interpreters: the kinds of map, of the deployed model.
        networks: a :class:`MapNetwork` for each.
        forest: weighs their logits.
        threshold: forest score above which there is an alarm.
        soft_threshold: the same for ``soft_score``.
    """

    interpreters: tuple[Interpreter, ...]
    networks: tuple[MapNetwork, ...]
    forest: Forest
    threshold: float = 0.5
    soft_threshold: float = 0.0

    def logits(self, x: Tensor) -> Tensor:
        """``[B, M]``: what each network says of its kind of map of ``x``."""
        said = [n(i.explain(x).maps) for i, n in zip(self.interpreters, self.networks, strict=True)]
        return torch.stack(said, 1)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """``[B]`` in ``[0, 1]``: the share of trees that say attacked."""
        return self.forest(self.logits(x))

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the mean of the networks' logits; differentiable where the maps are (a forest is not)."""
        return self.logits(x).mean(1)


@DEFENSES.register("x-ensemble", paper="Wang et al. 2020 (KDD)", needs=("data",))
@dataclass(frozen=True)
class XEnsemble(Defense):
    """Add a detector that compares the maps of clean inputs with those of attacked ones.

    The defense's samples are split: four fifths train the networks and the forest (on clean inputs and ``attack``'s),
    one fifth, clean, calibrates the alarm. The published work has no code; its abstract gives the structure.

    Args:
        members: kinds of map, as names, classes or names with settings; the system's own interpreter may be among them.
        attack: what the detector learns to see: it knows this attack and no other.
        training: of each network.
        trees: of the forest.
        samples: use at most so many of the defense's samples: their maps are held in memory.
        false_alarms: share of clean inputs that may raise the alarm.
    """

    members: Sequence[InterpreterSpec | type[Interpreter] | str] = ("gradient", "gradcam")
    attack: PGD = field(default_factory=PGD)
    training: Training = field(default_factory=lambda: Training(epochs=15, lr=3e-3))
    trees: Count = 200
    samples: Count = 2048
    false_alarms: Fraction = 0.05

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        assert data is not None  # refused at the door; for the type checker
        interpreters = tuple(member_of(system, resolve(member)) for member in self.members)
        total: int = len(data)
        size = min(total, self.samples)
        cut = size - max(size // 5, 1)
        if cut < 10:
            raise InputError(f"X-Ensemble needs some dozens of samples to train and calibrate on, got {size}")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(derive(self.seed, "split"))).tolist()
        x, y = (t.to(session.device) for t in stack(data, order[:cut]))
        clean, _ = stack(data, order[cut:size])
        with frozen(system.model):
            return replace(system, detector=self._train(system, interpreters, x, y, clean.to(x.device), session))

    def _train(
        self,
        system: System,
        interpreters: tuple[Interpreter, ...],
        x: Tensor,
        y: Tensor,
        clean: Tensor,
        session: Session,
    ) -> XEnsembleDetector:
        forged = attack_in_batches(self.attack, system.without_detector(), x, y, self.training.batch_size, self.seed)
        both = torch.cat([x, forged])
        labels = torch.cat([torch.zeros(len(x)), torch.ones(len(x))]).long()
        networks = []
        for index, interpreter in enumerate(interpreters):
            maps = torch.cat([interpreter(part) for part in both.split(self.training.batch_size)]).detach().cpu()
            networks.append(self._network(TensorDataset(maps, labels), index, session))
        bare = XEnsembleDetector(interpreters, tuple(networks), Forest(None))
        said = in_batches(bare.logits, both, self.training.batch_size)
        bare = replace(bare, forest=Forest.fit(said, labels, self.trees, derive(self.seed, "forest")))
        hard, soft = (in_batches(f, clean, self.training.batch_size) for f in (bare.score, bare.soft_score))
        return replace(
            bare, threshold=threshold_at(hard, self.false_alarms), soft_threshold=threshold_at(soft, self.false_alarms)
        )

    def _network(self, data: TensorDataset, index: int, session: Session) -> MapNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self.seed, "network", index))
            network = MapNetwork()
        seen = digest_tensors({"maps": data.tensors[0], "labels": data.tensors[1]})
        fit(network, binary_loss, data, self.training, name=f"x-ensemble-{index}", seed=self.seed,
            session=session, identity=seen)  # fmt: skip
        return network.requires_grad_(False)


def binary_loss(module: nn.Module, maps: Tensor, labels: Tensor, moment: TrainingStep) -> Tensor:
    """Binary cross-entropy of one logit a map, ``[b]``."""
    return nn.functional.binary_cross_entropy_with_logits(module(maps), labels.float(), reduction="none")


def attack_in_batches(attack: Attack, system: System, x: Tensor, y: Tensor, size: int, seed: int) -> Tensor:
    """Attacked inputs, each towards a random class, in batches of ``size``."""
    with torch.no_grad():
        num_classes = system.model(x[:1]).shape[1]
    goal = random_classes(x, y, num_classes, derive(seed, "goals"))
    parts = zip(x.split(size), y.split(size), goal.split(size), strict=True)
    return torch.cat([attack(system, *part).x for part in parts])


@torch.no_grad()
def in_batches(function: Any, x: Tensor, size: int) -> Tensor:
    """``function`` over batches of ``size``, concatenated."""
    return torch.cat([function(part) for part in x.split(size)])
