"""The saliency detector: a convolutional network that sees the image and its maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain import maps as ops
from robustexplain.attacks import PGD, Attack
from robustexplain.fields import Count
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.base import same
from robustexplain.models import ModelSpec
from robustexplain.registry import DEFENSES, DETECTORS, PARTS
from robustexplain.rounding import like_weights
from robustexplain.system import Explained, System
from robustexplain.training import Session, Training

from ..interpreters.aggregated import member_of, resolve
from .base import Detector, DetectorDefense
from .detector import in_batches
from .directed import Explain, directed, plain
from .learned import NamedAttack, check_attack, images_only, learned, refuse_misfit, seeded, seen_attacked
from .map_network import small_cnn
from .of_maps import MapsDetector


@PARTS.register("saliency-network")
class SaliencyNetwork(nn.Module):
    """A small CNN on an image and its maps, ``[B, C, H, W]`` together, with one logit ``[B]``; above 0 is attacked."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.spec = ModelSpec("saliency-network", {"channels": channels, "width": width})
        self.layers = small_cnn(channels, width)

    def forward(self, seen: Tensor) -> Tensor:
        """``[B]`` logits."""
        logits: Tensor = self.layers(like_weights(seen, self))[:, 0]
        return logits


@DETECTORS.register("saliency-cnn", paper="Zhang et al. 2018 (saliency maps detect adversarial examples)")
@dataclass(frozen=True, eq=False)
class SaliencyCNNDetector(MapsDetector):
    """A network on the image and its maps of the predicted class.

    Args:
        interpreters: the kinds of map, of the deployed model.
        network: on the channels of the image, and a channel for each map.
    """

    network: SaliencyNetwork

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the log-odds of being attacked."""
        found: Tensor = self.network(image_and_maps(self.interpreters, x, plain, seen))
        return found

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same of maps with a gradient."""
        found: Tensor = self.network(image_and_maps(self.interpreters, x, directed))
        return found


@DEFENSES.register(
    "saliency-cnn", paper="Zhang et al. 2018 (saliency maps detect adversarial examples)", needs=("data",)
)
@dataclass(frozen=True)
class SaliencyCNN(DetectorDefense):
    """Add a detector that classifies an image together with its map as clean or attacked.

    There is no published code. The paper's is the input, the image and its saliency together (abstract). Ours: maps of
    the predicted class by any interpreter, the small network, and the threshold.

    Args:
        members: kinds of map, as names, classes or names with settings; none: the system's own interpreter.
        attack: the only one that the detector is trained on.
        training: of the network.

    Raises:
        FieldError: an attack that gives nothing to train on.
    """

    members: Sequence[InterpreterSpec | type[Interpreter] | str] = ()
    attack: Attack | NamedAttack = field(default_factory=lambda: PGD(steps=40))
    training: Training = field(default_factory=lambda: Training(epochs=15, lr=3e-3))
    batch_size: Count = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))
        check_attack(self, self.attack)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return images_only(self, shape)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        refuse_misfit(self, x)
        assert isinstance(self.attack, Attack)  # checked when it was made; for the type checker
        interpreters = tuple(member_of(system, resolve(m)) for m in self.members) or (system.interpreter,)
        inputs, labels = seen_attacked(self.attack, system.without_detector(), x, y, self.batch_size, self.seed)
        found = in_batches(lambda part: image_and_maps(interpreters, part, plain), inputs, self.batch_size)
        network = seeded(SaliencyNetwork, {"channels": found.shape[1]}, self.seed)
        learned(network, found, labels, self, system, (x, y), session, interpreters=interpreters)
        return SaliencyCNNDetector(interpreters, network)


def image_and_maps(
    interpreters: Sequence[Interpreter], x: Tensor, explain: Explain, seen: Explained | None = None
) -> Tensor:
    """``[B, C + M, H, W]``: the image, and each interpreter's map divided by its largest magnitude."""
    maps = (seen.maps if seen and same(seen.interpreter, i) else explain(i, x, None).maps for i in interpreters)
    return torch.cat([x, *(ops.absmax(found)[:, None].to(x) for found in maps)], 1)
