"""X-Ensemble: a small network per kind of map tells attacked from clean; a random forest combines their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from robustexplain.attacks import PGD, Attack
from robustexplain.fields import Count, identified
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.base import same
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES, DETECTORS, INTERPRETERS
from robustexplain.system import Explained, System
from robustexplain.training import Session, Training, fit

from ..interpreters.aggregated import member_of, resolve
from .base import Detector, DetectorDefense
from .detector import in_batches
from .directed import Explain, directed, plain
from .forest import Forest
from .learned import NamedAttack, attack_in_batches, binary_loss, check_attack, weights_of
from .map_network import MapNetwork
from .of_maps import MapsDetector


@DETECTORS.register("x-ensemble", paper="Wang et al. 2020 (KDD)")
@dataclass(frozen=True, eq=False)
class XEnsembleDetector(MapsDetector):
    """A network per kind of map, and a random forest over their logits.

    Args:
        interpreters: the kinds of map, of the deployed model.
        networks: a :class:`MapNetwork` for each.
        forest: combines their logits.
    """

    networks: tuple[MapNetwork, ...]
    forest: Forest

    def logits(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B, M]``: each network's logit for its kind of map of ``x``; a map in ``seen`` is not computed again."""
        return network_logits(self.interpreters, self.networks, x, seen)

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]`` in ``[0, 1]``: the share of trees that vote for attacked."""
        return self.forest(self.logits(x, seen))

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: log-odds of the smoothed forest's votes for maps with a gradient; a forest has none."""
        return self.forest.smoothed(network_logits(self.interpreters, self.networks, x, explain=directed))

    @torch.no_grad()
    def reasons(self, x: Tensor) -> dict[str, Tensor]:
        """The forest's score, and each network's logit under its interpreter's name."""
        logits = self.logits(x)
        names = [INTERPRETERS.name_of(type(interpreter)) for interpreter in self.interpreters]
        return {"score": self.forest(logits)} | dict(zip(names, logits.unbind(1), strict=True))


@DEFENSES.register("x-ensemble", paper="Wang et al. 2020 (KDD)", needs=("data",))
@dataclass(frozen=True)
class XEnsemble(DetectorDefense):
    """Add a detector that compares the maps of clean inputs with those of attacked ones.

    The defense's samples are split: four fifths train the networks and the forest (on clean inputs and ``attack``'s),
    one fifth calibrates the threshold: by default the largest of those for clean and for harmlessly changed inputs;
    with ``harmless: null`` it is for clean ones alone, as in the paper. There is no published code; the structure is
    that of the paper's abstract.

    Args:
        members: kinds of map, as names, classes or names with settings; may include the system's
            own interpreter.
        attack: that the detector is trained on.
        also: further attacks: the training inputs are dealt out in turn, so that their number stays the same.
        training: of each network.
        trees: of the forest.
    """

    members: Sequence[InterpreterSpec | type[Interpreter] | str] = ("gradient", "gradcam")
    attack: PGD = field(default_factory=PGD)
    also: tuple[Attack | NamedAttack, ...] = field(default=(), kw_only=True)
    training: Training = field(default_factory=lambda: Training(epochs=15, lr=3e-3))
    trees: Count = 200
    batch_size: Count = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))
        object.__setattr__(self, "also", tuple(self.also))
        for attack in self.also:
            check_attack(self, attack, "also")

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        interpreters = tuple(member_of(system, resolve(member)) for member in self.members)
        both = torch.cat([x, self._attacked(system.without_detector(), x, y)])
        labels = torch.cat([torch.zeros(len(x)), torch.ones(len(x))]).long()
        networks = []
        for index, interpreter in enumerate(interpreters):
            maps = in_batches(interpreter, both, self.batch_size).cpu()
            # Not the maps: they differ in last bits between kinds of machine and numbers of threads.
            identity: list[object] = [
                identified(self),
                digest_tensors({"y": y}),
                interpreter.described(),
                weights_of(interpreter),
            ]
            data = TensorDataset(maps, labels), TensorDataset(x, y)
            networks.append(self._network(index, *data, session, identity))
        logits = in_batches(lambda part: network_logits(interpreters, networks, part), both, self.batch_size)
        forest = Forest.fit(logits, labels, self.trees, derive(self.seed, "forest"))
        return XEnsembleDetector(interpreters, tuple(networks), forest)

    def _attacked(self, system: System, x: Tensor, y: Tensor) -> Tensor:
        """Each input by one of the attacks."""
        attacks, found = (self.attack, *self.also), torch.empty_like(x)
        for place, attack in enumerate(attacks):
            assert isinstance(attack, Attack)  # checked when it was made; for the type checker
            rows = slice(place, None, len(attacks))
            if len(x[rows]):
                made = attack_in_batches(attack.adapted(system), system, x[rows], y[rows], self.batch_size, self.seed)
                found[rows] = made
        return found

    def _network(
        self, index: int, data: TensorDataset, source: TensorDataset, session: Session, identity: list[object]
    ) -> MapNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self.seed, "network", index))
            network = MapNetwork()
        fit(network, binary_loss, data, self.training, name=f"x-ensemble-{index}",
            seed=self.seed, session=session, identity=identity, source=source)  # fmt: skip
        return network.requires_grad_(False)


def network_logits(
    interpreters: Sequence[Interpreter],
    networks: Sequence[MapNetwork],
    x: Tensor,
    seen: Explained | None = None,
    explain: Explain = plain,
) -> Tensor:
    """``[B, M]``: each network's logit for its interpreter's map; a map in ``seen`` is not computed again."""
    known = None if seen is None else seen.interpreter
    maps = (seen.maps if seen and same(known, i) else explain(i, x, None).maps for i in interpreters)
    return torch.stack([network(found) for network, found in zip(networks, maps, strict=True)], 1)
