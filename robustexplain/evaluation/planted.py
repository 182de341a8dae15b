"""Planted goals: does an attack reach maps that are known to be reachable?

After Zimmermann et al. 2022, who plant adversarial predictions. It tests the attack on the defense, needs no
retraining, and works for any interpreter and detector. Where an attack fails, its cells prove nothing about the
defense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import Attack, Known
from ..attacks.known import NOTHING
from ..errors import InputError
from ..metrics import MapMetric
from ..random_streams import Streams
from ..system import System
from .calibration import ROUNDING
from .statistics import Estimate, share

PROVEN = 0.95
"""The share of planted goals that an attack must find (Zimmermann et al. 2022)."""
DRAWS = 5
"""How many inputs are drawn for a sample until one keeps the prediction."""
GRID = 4
"""Cells of the noise along each side."""


@dataclass(frozen=True, eq=False)
class Planted:
    """Goals that are known to be reachable, for the ``n`` samples that have one.

    Args:
        rows: ``[n]``, which of the given samples.
        x: ``[n, C, H, W]``, benign.
        prediction: ``[n]``, to be kept.
        maps: ``[n, H, W]``, the goals: the system's own maps of inputs in the ball.
        start: ``[n]``, distance of the benign map to the goal.
        alarm: ``[n]`` bool, whether the planted input raises the alarm.
    """

    rows: Tensor
    x: Tensor
    prediction: Tensor
    maps: Tensor
    start: Tensor
    alarm: Tensor


@dataclass(frozen=True, eq=False)
class Proof:
    """What an attack found of the planted goals.

    Args:
        found: ``[n]`` bool.
        distance: ``[n]``, of the map that it ended at to the goal, as a share of the benign map's.
        planted: the goals.
    """

    found: Tensor
    distance: Tensor
    planted: Planted

    @property
    def share(self) -> Estimate:
        """The share found, with its exact interval (Clopper and Pearson 1934)."""
        return share(self.found.float())

    @property
    def proven(self) -> bool:
        """Whether the attack found 95% or more; false where nothing could be planted."""
        value = self.share.value
        return value is not None and value >= PROVEN

    def summary(self) -> dict[str, Any]:
        """As plain data, with a flag's words."""
        words = {} if self.proven else {"flag": "attack not proven"}
        return {"found": self.share.as_dict(), "proven": self.proven, **words}


@torch.no_grad()
def plant(system: System, x: Tensor, eps: float, seed: int = 0, distance: MapMetric | None = None) -> Planted:
    """Plant a goal for each sample: the system's own map of an input in the ball that no gradient had a hand in.

    The input is ``x + eps sign(n)``, clipped to ``[0, 1]``, of noise ``n`` that is smooth. Another is drawn, up to
    :data:`DRAWS` times, where the prediction changes or the map stays the same; samples without one are left out.

    Args:
        system: as deployed.
        x: benign inputs ``[B, C, H, W]``.
        eps: radius of the ball.
        seed: of the draws; each sample has its own stream.
        distance: of maps; default L1.

    Raises:
        InputError: inputs that are no images.
    """
    if x.dim() != 4:
        raise InputError(f"goals are planted for images [B, C, H, W], got x of shape {list(x.shape)}")
    known = NOTHING if distance is None else Known(distance)
    benign, streams = system(x), Streams.of(x, seed, "planted")
    star, done = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(DRAWS):
        drawn = (x + eps * smooth_noise(x, streams).sign()).clamp(0, 1)
        seen = system(drawn)
        good = (seen.prediction == benign.prediction) & (known.apart(seen.maps, benign.maps) > ROUNDING) & ~done
        star[good], done = drawn[good], done | good
    rows = done.nonzero()[:, 0]
    if not len(rows):
        nothing = benign.maps[rows]
        return Planted(rows, x[rows], benign.prediction[rows], nothing, nothing.flatten(1).sum(1), done[rows])
    goal = system(star[rows])
    alarm = torch.zeros_like(rows, dtype=torch.bool) if goal.alarm is None else goal.alarm
    start = known.apart(goal.maps, benign.maps[rows])
    return Planted(rows, x[rows], benign.prediction[rows], goal.maps, start, alarm)


def prove(
    attack: Attack,
    system: System,
    planted: Planted,
    distance: MapMetric | None = None,
    root: System | None = None,
) -> Proof | None:
    """Ask an attack, told to keep the prediction, to reach the planted goals.

    A goal is found where the attack ends at half the benign map's distance or nearer, the prediction stays, and no
    alarm rings that did not ring at the planted input.

    Args:
        attack: a column's; adapted already, if its adversary is adaptive.
        system: as deployed.
        planted: the goals for it.
        distance: of maps, as they were planted by.
        root: the undefended system, if the adversary knows it and the attacked one is another.

    Returns:
        ``None`` for an attack that cannot be given a goal map.
    """
    reaching = attack.reaching()
    if reaching is None:
        return None
    known = replace(NOTHING if distance is None else Known(distance), limit=planted.start / 2, root=root)
    kept = planted.prediction
    if not len(kept):
        return Proof(kept > 0, planted.start, planted)
    with torch.no_grad():
        classes = system(planted.x[:1]).logits.shape[1]
    # An attack on the prediction keeps it where the predicted class is its goal and another one its label.
    label, goal = (kept, None) if reaching.keeps_prediction else ((kept + 1) % classes, kept)
    made = reaching.informed(known)(system, planted.x, label, goal, planted.maps)
    with torch.no_grad():
        seen = system(made.x)
    ends = known.apart(seen.maps, planted.maps)
    found = (seen.prediction == kept) & (ends <= planted.start / 2)
    if seen.alarm is not None:
        found &= ~seen.alarm | planted.alarm
    return Proof(found, ends / planted.start, planted)


def smooth_noise(x: Tensor, streams: Streams) -> Tensor:
    """Normal noise of the shape of ``x`` on a coarse grid, interpolated."""
    coarse = streams.normal(x.new_empty(*x.shape[:2], GRID, GRID))
    return F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
