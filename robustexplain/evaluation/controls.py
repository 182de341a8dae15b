"""What an attack is set against in a full audit: random draws, a system whose draws are frozen, other weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from .. import maps as ops
from ..attacks import L2, Adaptation, Attack, Linf
from ..metrics import MapMetric, hit
from ..models.randomise import randomise, stages
from ..random_streams import Streams, frozen
from ..system import System, draws
from .calibration import distance_of
from .judged import Chunk


@torch.no_grad()
def best_random(
    attack: Attack, system: System, chunk: Chunk, distance: MapMetric | None, draws: int
) -> dict[str, Tensor]:
    """Of each input, the best of many random changes in the attack's ball, ``[B]`` each; empty without a ball.

    ``success``: whether any is predicted as the adversary wants; for an attack that moves the map ``distance``: the
    largest distance of a map whose prediction stayed.
    """
    threat, found = attack.plan(system).threat, torch.zeros(len(chunk.x), device=chunk.x.device)
    measured = attack.moves_map and distance is not None
    if type(threat) not in (Linf, L2) or (attack.keeps_prediction and not measured):
        return {"success": found[:0]}
    assert isinstance(threat, (Linf, L2))
    kept, streams = system(chunk.x) if measured else None, Streams.of(chunk.x, attack.seed, "best of many")
    for i in range(draws):
        x = _changed(threat, chunk.x, streams, corner=i % 2 == 0)
        if kept is None:
            won = hit(system.model(x), chunk.y, chunk.goal_class).float()
        else:
            assert distance is not None
            seen = system(x)
            won = distance_of(distance, seen.maps, kept.maps) * (seen.prediction == kept.prediction)
        found = torch.maximum(found, won.to(found))
    return {"distance" if measured else "success": found.cpu()}


def _changed(threat: Linf | L2, x: Tensor, streams: Streams, *, corner: bool) -> Tensor:
    """A random change of the size of the ball, or within the box."""
    if isinstance(threat, L2) or not corner:
        return threat.project(x, threat.sample(x, streams))
    return threat.project(x, x + threat.eps * streams.normal(x).sign())


def with_frozen_draws(attack: Attack, system: System, chunk: Chunk) -> dict[str, Tensor]:
    """``success`` ``[B]`` against the classifier with one draw for all inputs; empty where nothing in it draws."""
    if attack.keeps_prediction or not draws(system.model):
        return {"success": torch.zeros(0)}
    adapt = getattr(attack, "adapt", None)
    # There is nothing to average over: the draw that is attacked is the one that is judged.
    alone = replace(attack, adapt=replace(adapt, draws=1)) if isinstance(adapt, Adaptation) else attack  # type: ignore[call-arg]
    with frozen():
        made = alone(system, chunk.x, chunk.y, chunk.goal_class)
    return {"success": made.success.float().cpu()}


@torch.no_grad()
def other_weights(system: System, x: Tensor, distance: MapMetric) -> dict[str, Tensor]:
    """``distance`` ``[B]`` of the maps of a classifier whose weights are all drawn anew (Adebayo et al. 2018)."""
    seen = system(x)
    copied = copy.deepcopy(system.interpreter)
    for stage in stages(copied.model, x):
        randomise(copied.model, stage, x, 0)
    maps = copied.explain(x, seen.prediction).maps
    finite = maps.flatten(1).isfinite().all(1)
    apart = distance_of(distance, torch.where(ops.expand(finite, maps), maps, 0), seen.maps)
    return {"distance": torch.where(finite, apart, torch.inf).cpu()}
