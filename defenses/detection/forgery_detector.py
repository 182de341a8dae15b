"""A detector of forgeries that is attacked again while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustexplain.attacks import Attack, MapPGD
from robustexplain.fields import Count
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import System
from robustexplain.training import Session, Training
from robustexplain.transforms import HarmlessChange, harmless_for, one_of

from ..interpreters.aggregated import member_of, resolve
from .base import Detector, DetectorDefense
from .detector import in_batches
from .directed import plain
from .learned import (
    NamedAttack,
    attack_in_batches,
    check_attack,
    deceiving,
    images_only,
    learned,
    refuse_misfit,
    seeded,
)
from .saliency_cnn import SaliencyCNNDetector, SaliencyNetwork, image_and_maps


@DETECTORS.register("forgery-detector", paper="this project")
@dataclass(frozen=True, eq=False)
class ForgeryDetector(SaliencyCNNDetector):
    """A network on the image and its maps of the predicted class, which was attacked while it was trained."""


@DEFENSES.register("forgery-detector", paper="this project", needs=("data",))
@dataclass(frozen=True)
class ForgeryTraining(DetectorDefense):
    """Add a detector that was trained on forgeries and on harmless changes, and attacked again for some rounds.

    Round 0 learns what ``attack`` makes against the system without a detector. In each later one the attack, adapted to
    the detector of the round before (at the threshold of that round), forges the training inputs anew; the network goes
    on from its weights, on the forgeries of all rounds so far and on as many harmlessly changed inputs. What it costs
    in training is ``rounds + 1`` attacks; deployed, it costs a map of each kind besides the system's own.

    Args:
        members: kinds of map, as names, classes or names with settings; none: the system's own interpreter.
        attack: of the rounds; it should be one that forges maps.
        rounds: how often the detector is attacked again.
        training: of the network, in each round.
        changes: which inputs are harmless, though no longer clean; none: the usual changes of images.

    Raises:
        FieldError: an attack that gives nothing to train on.
    """

    members: Sequence[InterpreterSpec | type[Interpreter] | str] = ()
    attack: Attack | NamedAttack = field(default_factory=lambda: MapPGD(steps=30))
    rounds: Count = 3
    training: Training = field(default_factory=lambda: Training(epochs=10, lr=3e-3))
    changes: tuple[HarmlessChange, ...] = ()
    batch_size: Count = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))
        object.__setattr__(self, "changes", tuple(self.changes))
        check_attack(self, self.attack)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return images_only(self, shape)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        refuse_misfit(self, x)
        interpreters = tuple(member_of(system, resolve(m)) for m in self.members) or (system.interpreter,)
        changes, attacked = harmless_for(self.changes, x.shape[1:]), system.without_detector()
        network = seeded(SaliencyNetwork, {"channels": x.shape[1] + len(interpreters)}, self.seed)
        detector, harmless, forged = ForgeryDetector(interpreters, network), [x], []
        for number in range(self.rounds + 1):
            harmless.append(one_of(changes, x, derive(self.seed, "harmless", number)))
            forged.append(self._forged(attacked, x, y, number))
            if number:
                unseen = in_batches(detector.score, forged[-1], self.batch_size) <= detector.threshold
                share = float(unseen.float().mean())
                session.progress.say(f"forgery-detector: round {number}, {share:.0%} of forged inputs raise no alarm")
            inputs = torch.cat([*harmless, *forged])
            labels = torch.arange(len(inputs)) >= len(x) * len(harmless)
            self._learn(network, interpreters, inputs, labels.long(), (x, y), system, session, number)
            detector = replace(detector, network=network).calibrated(torch.cat(harmless), self.false_alarms)
            attacked = replace(attacked, detector=detector)
        return ForgeryDetector(interpreters, network)

    def _forged(self, system: System, x: Tensor, y: Tensor, number: int) -> Tensor:
        """As many inputs as ``x`` that deceive the system, made by an adversary who knows it."""
        assert isinstance(self.attack, Attack)  # checked when it was made; for the type checker
        attack = self.attack.adapted(system)
        made = attack_in_batches(attack, system, x, y, self.batch_size, derive(self.seed, "round", number))
        return deceiving(system.model, x, made, self.batch_size)

    def _learn(
        self,
        network: SaliencyNetwork,
        interpreters: tuple[Interpreter, ...],
        inputs: Tensor,
        labels: Tensor,
        source: tuple[Tensor, Tensor],
        system: System,
        session: Session,
        number: int,
    ) -> None:
        network.requires_grad_(True)
        found = in_batches(lambda part: image_and_maps(interpreters, part, plain), inputs, self.batch_size)
        learned(network, found, labels, self, system, source, session, name=f"forgery-detector-{number}",
                interpreters=interpreters)  # fmt: skip
