"""Planted predictions: does an attack find adversarial examples that are known to exist?

After Zimmermann et al. 2022 (the binarisation test): for each sample the classifier's last layer is replaced by a
linear readout that tells one point on the edge of the ball from random points inside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import L2, Attack, Box, Known, Linf, TanhBox, Threat
from ..attacks.joint.aimed import Aimed
from ..autograd.layers import hooks, submodule
from ..door import answer
from ..errors import InputError
from ..hidden import hidden
from ..interpreters import Gradient
from ..random_streams import Streams
from ..system import System, draws, redrawn
from .planted import smooth_noise

INNER = 200
"""Random points inside the ball that a readout tells from the planted one (the paper's code: 999 and the sample)."""
EDGE = 0.95
"""Their largest distance, as a share of the radius (as in the paper)."""
BATCH = 128
"""How many of them the classifier sees at once."""
DRAWS = 5
"""How many points are drawn for a sample until a readout tells one from the inner points."""
RANDOM = 50
"""Random points on the edge of the ball, of each sample, with which the attack is compared."""
BENIGN = 3.0
"""The size of the score at a benign input, of the order of a logit."""
FREE = 8 / 255
"""Where an attack minimises its change, what is planted is at this L-infinity distance."""


class Binary(nn.Module):
    """A classifier whose last layer is a linear readout of two classes, one of its own for each of ``n`` samples.

    Args:
        of: the classifier.
        head: the name of its last linear layer, whose input is read; ``None``: its answer is read.
        x: the samples ``[n, C, H, W]``; an input is taken for a change of the one that it is nearest to.
        weight: ``[n, F]``.
        bias: ``[n]``.
    """

    def __init__(self, of: nn.Module, head: str | None, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.of, self.head, self.x, self.weight, self.bias = of, head, x, weight, bias
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 2]``: class 1 is the planted one."""
        owner = torch.cdist(x.detach().flatten(1).float(), self.x.flatten(1).float()).argmin(1)
        score = (features(self.of, self.head, x) * self.weight[owner]).sum(1) + self.bias[owner]
        return torch.stack([-score / 2, score / 2], 1)

    @property
    def random(self) -> bool:
        """Whether the classifier draws."""
        return draws(self.of)

    def redrawn(self, seed: int) -> Binary:
        """On the classifier with other draws."""
        return Binary(redrawn(self.of, seed), self.head, self.x, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class PlantedPredictions:
    """Classifiers in which an adversarial example is known to exist, for the ``n`` samples that have one.

    Args:
        rows: ``[n]``, which of the given samples.
        x: ``[n, C, H, W]``, benign: of class 0.
        system: the binary classifier.
        star: ``[n, C, H, W]``, the planted inputs: of class 1.
        random: ``[n]`` bool, whether one of :data:`RANDOM` random points of the ball's edge is of class 1.
    """

    rows: Tensor
    x: Tensor
    system: System
    star: Tensor
    random: Tensor


def features(model: nn.Module, head: str | None, x: Tensor) -> Tensor:
    """``[B, F]``: the input of the layer ``head``; without one, what the model answers."""
    if head is None:
        return answer(model, x, finite=False)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0])

    handle = submodule(model, head).register_forward_pre_hook(keep)
    try:
        model(x)
    finally:
        handle.remove()
    return kept[-1].flatten(1)


@torch.no_grad()
def head_of(model: nn.Module, x: Tensor) -> str | None:
    """The name of the linear layer that gives the model's answer; ``None`` where there is no such layer."""
    if hidden(model) is not None:
        return None
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if type(m) is nn.Linear}
    outputs: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        outputs[names[module]] = output.clone()

    with hooks(list(names), keep):
        logits = answer(model, x[:1])
    last = [name for name, output in outputs.items() if output.shape == logits.shape and torch.equal(output, logits)]
    return last[-1] if last else None


def threat_of(attack: Attack, system: System) -> Threat | None:
    """A ball in which predictions can be planted for an attack; ``None`` for one that keeps the prediction or has none.

    An attack that minimises its change has the L2 ball without a radius: it must get as near as what is planted.
    """
    if attack.keeps_prediction or attack.needs_data or (attack.needs_maps and not isinstance(attack, Aimed)):
        return None
    threat = attack.plan(system).threat
    if isinstance(threat, (Box, TanhBox)):
        return Box()
    return threat if type(threat) in (Linf, L2) else None


@torch.no_grad()
def plant_predictions(system: System, x: Tensor, threat: Threat, seed: int = 0) -> PlantedPredictions:
    """Plant an adversarial example for each sample: a point of the ball's edge that a linear readout tells from inside.

    The readout is on the input of the classifier's last linear layer, or on what it answers where it ends otherwise.
    Departures from the paper: Fisher's discriminant in place of logistic regression, a half of the inner points with
    the smooth noise that the planted one has; the detector is left out, which watches another classifier.

    Args:
        system: as deployed.
        x: benign inputs ``[B, C, H, W]``.
        threat: the ball; of an attack that minimises its change what is planted is at :data:`FREE`.
        seed: of the draws; each sample has its own stream.

    Raises:
        InputError: inputs that are no images.
    """
    if x.dim() != 4:
        raise InputError(f"predictions are planted for images [B, C, H, W], got x of shape {list(x.shape)}")
    head, streams = head_of(system.model, x), Streams.of(x, seed, "planted predictions")
    inner = torch.stack([_inner(x, streams, threat, smooth=i % 2 > 0) for i in range(INNER)], 1)
    inner = torch.cat([x[:, None], inner], 1)
    inside = _all_features(system.model, head, inner).double()
    star, known = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    weight, bias = inside.new_zeros(len(x), inside.shape[2]), inside.new_zeros(len(x))
    for _ in range(DRAWS):
        drawn = _edge(x, streams, threat)
        w, b, told = _readout(inside, features(system.model, head, drawn).double())
        new = told & ~known
        star[new], weight[new], bias[new], known = drawn[new], w[new], b[new], known | new
    rows = known.nonzero()[:, 0]
    own = features(system.model, head, x[:1]).dtype
    model = Binary(system.model, head, x[rows], weight[rows].to(own), bias[rows].to(own))
    streams = Streams.of(x[rows], seed, "random search")
    tried = torch.stack([_edge(x[rows], streams, threat) for _ in range(RANDOM)], 1)
    score = (_all_features(system.model, head, tried) * model.weight[:, None]).sum(2) + model.bias[:, None]
    return PlantedPredictions(rows, x[rows], System(model, Gradient(model)), star[rows], (score > 0).any(1))


def prove_prediction(attack: Attack, planted: PlantedPredictions, threat: Threat, targeted: bool) -> Tensor:
    """``[n]`` bool: whether an attack finds what is planted; one that minimises its change, at most as far (L2).

    Args:
        attack: adapted to the planted system already, if its adversary is adaptive.
        planted: for it.
        threat: for which they were planted.
        targeted: whether it is told the class.
    """
    label = torch.zeros_like(planted.rows)
    if not len(label):
        return label > 0
    # An ensemble stops where the prediction is as wanted: whatever the map.
    asked = attack.informed(replace(Known(), limit=torch.inf))
    made = asked(planted.system, planted.x, label, label + 1 if targeted else None)
    found = made.success
    if isinstance(threat, Box):
        moved, allowed = ((other - planted.x).flatten(1).norm(dim=1) for other in (made.x, planted.star))
        found = found & (moved <= allowed)
    return found


def _all_features(model: nn.Module, head: str | None, x: Tensor) -> Tensor:
    """``[B, N, F]`` of inputs ``[B, N, C, H, W]``."""
    found = [features(model, head, part) for part in x.flatten(0, 1).split(BATCH)]
    return torch.cat(found).view(*x.shape[:2], -1) if found else x.new_zeros(0, x.shape[1], 1)


def _readout(inside: Tensor, star: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight ``[B, F]`` and bias ``[B]`` that tell ``star`` ``[B, F]`` from ``inside`` ``[B, N, F]``; where they do."""
    mean = inside.mean(1)
    centred = inside - mean[:, None]
    count = inside.shape[1]
    ridge = centred.square().mean((1, 2)).clamp(min=1e-12)[:, None] * 1e-2
    # The ridge's inverse by Woodbury's identity: a matrix of inner points instead of features.
    gram = centred @ centred.transpose(1, 2) + count * ridge[:, :, None] * torch.eye(count).to(inside)
    way = (star - mean)[:, :, None]
    weight = ((way - centred.transpose(1, 2) @ torch.linalg.solve(gram, centred @ way))[:, :, 0]) / ridge
    inner, planted = (inside @ weight[:, :, None])[:, :, 0], (star * weight).sum(1)
    largest, span = inner.amax(1), inner.amax(1) - inner.amin(1)
    told = planted - largest > 1e-3 * span.clamp(min=1e-12)
    bias = -(planted + largest) / 2
    scale = BENIGN / (-(inner[:, 0] + bias)).clamp(min=1e-12)
    return weight * scale[:, None], bias * scale, told & weight.isfinite().all(1)


def _inner(x: Tensor, streams: Streams, threat: Threat, smooth: bool) -> Tensor:
    """Points inside the ball."""
    if isinstance(threat, L2):
        return (x + EDGE * threat.eps * _unit(smooth_noise(x, streams) if smooth else streams.normal(x))).clamp(0, 1)
    noise = smooth_noise(x, streams).sign() if smooth else streams.uniform(x, -1, 1)
    return (x + EDGE * _radius(threat) * noise).clamp(0, 1)


def _edge(x: Tensor, streams: Streams, threat: Threat) -> Tensor:
    """Points of the ball's edge."""
    noise = smooth_noise(x, streams)
    if isinstance(threat, L2):
        return (x + threat.eps * _unit(noise)).clamp(0, 1)
    return (x + _radius(threat) * noise.sign()).clamp(0, 1)


def _radius(threat: Threat) -> float:
    return threat.eps if isinstance(threat, Linf) else FREE


def _unit(noise: Tensor) -> Tensor:
    return F.normalize(noise.flatten(1), dim=1).view_as(noise)
