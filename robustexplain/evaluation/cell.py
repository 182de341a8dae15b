"""What a cell measures on one chunk of images: tensors, one value a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attacks import Attack, random_class_maps, random_classes, random_patch_maps
from ..metrics import (
    Faithfulness,
    MapMetric,
    MapScore,
    Metric,
    Stability,
    Visibility,
    confidence,
    hit,
    joint_success,
    stabilities,
)
from ..random_streams import derive
from ..recipe.experiment import Column, Evaluation
from ..system import Explained, System

SEARCH = ("zero_direction", "stalled", "surrogate_misled", "queries")
"""What a search reports of itself, one figure a sample."""


@dataclass(frozen=True)
class Chunk:
    """Some judged images with everything that is fixed about them.

    Args:
        index: which chunk.
        x: ``[B, C, H, W]``.
        y: labels ``[B]``.
        goal_class: ``[B]``, or ``None`` for untargeted attacks.
        samples: ``[B]``, positions in the test part.
    """

    index: int
    x: Tensor
    y: Tensor
    goal_class: Tensor | None
    samples: Tensor


@dataclass(frozen=True)
class Pool:
    """Benign images of the defense part (or any that nobody is judged on) for goal maps of other classes."""

    x: Tensor
    y: Tensor


def goal_classes(x: Tensor, y: Tensor, num_classes: int, seed: int, targeted: bool) -> Tensor | None:
    """The classes that attacks aim at, from each sample's own stream."""
    return random_classes(x, y, num_classes, derive(seed, "goal")) if targeted else None


def goal_map(column: Column, system: System, chunk: Chunk, pool: Pool, seed: int) -> Tensor | None:
    """The map that the column's adversary wants seen; ``None`` is the benign map."""
    if column.goal_map == "random-patch":
        return random_patch_maps(chunk.x, derive(seed, "patch"))
    if column.goal_map == "random-class":
        other = chunk.y if chunk.goal_class is None else chunk.goal_class
        return random_class_maps(system.interpreter, chunk.x, other, pool.x, pool.y, derive(seed, "pool"))
    default: Tensor | None = column.attack.default_goal_map(chunk.x)
    return default


def craft(attack: Attack, system: System, chunk: Chunk, wanted: Tensor | None) -> dict[str, Tensor]:
    """Attacked inputs of a chunk, and what the search says of itself (``SEARCH``)."""
    goal_class = None if attack.keeps_prediction else chunk.goal_class
    made = attack(system, chunk.x, chunk.y, goal_class, wanted)
    arrays = {"x": made.x} | {name: getattr(made, name).float() for name in SEARCH}
    return arrays if wanted is None else {**arrays, "goal_map": wanted}


@torch.no_grad()
def measure(
    system: System,
    chunk: Chunk,
    attacked: dict[str, Tensor],
    metrics: dict[str, Metric],
    settings: Evaluation,
    attack: Attack,
    honest: System | None = None,
) -> dict[str, Tensor]:
    """Everything a cell reports of a chunk, ``[B]`` each, and ``x``, ``attacked_x`` and the maps for the pictures.

    The map that an attack must resemble to be plausible is its goal map: the benign map, or the one it was given. An
    attack that is after the explanation alone wins where the prediction stays and the map no longer resembles the
    benign one. Where the system is a manipulated one, ``honest`` is what it was made of, and map metrics are also taken
    to its maps of the benign inputs (``l1_honest`` and so on). Where a goal map was given, they are also taken to it
    (``l1_goal``), and ``l1_nearer`` is 1 where it is nearer than the benign map.
    """
    x = attacked["x"].to(chunk.x)
    benign = system(chunk.x)
    # What is not attacked is not explained twice: LIME and KernelSHAP ask for thousands of rows each time.
    seen = benign if torch.equal(x, chunk.x) else system(x)
    wanted = attacked.get("goal_map", benign.maps).to(benign.maps)
    goal_class = chunk.goal_class
    if attack.keeps_prediction:
        goal_class = benign.prediction
    success = hit(seen.logits, chunk.y, goal_class)
    plausible = _map_metric(metrics["iou"])(seen.maps, wanted) > settings.plausible
    if attack.moves_map:
        plausible = ~plausible
    arrays = {
        "sample": chunk.samples,
        "label": chunk.y,
        "prediction": seen.prediction,
        "success": success.float(),
        "confidence": confidence(seen.logits, chunk.y, goal_class),
        "plausible": plausible.float(),
        "joint": joint_success(success, plausible, seen.alarm).float(),
        **{name: attacked[name] for name in SEARCH},
        "perturbation": (x - chunk.x).flatten(1).abs().amax(1),
        "x": chunk.x,
        "attacked_x": x,
        "map": benign.maps,
        "attacked_map": seen.maps,
    }
    if goal_class is not None:
        arrays["goal_class"] = goal_class
    references = {}
    if "goal_map" in attacked:
        references["goal"] = arrays["goal_map"] = wanted
    if honest is not None:
        references["honest"] = honest(chunk.x).maps
    arrays |= _figures(metrics, system, chunk.x, x, benign.maps, seen, references)
    if seen.score is not None and seen.alarm is not None and benign.score is not None:
        arrays |= {"score": seen.score, "alarm": seen.alarm.float(), "clean_score": benign.score}
    return {name: value.cpu() for name, value in arrays.items()}


def _figures(
    metrics: dict[str, Metric],
    system: System,
    clean: Tensor,
    x: Tensor,
    benign: Tensor,
    seen: Explained,
    references: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Every metric of a cell's chunk; those of maps to each of ``references`` too, as ``l1_goal`` or ``l1_honest``."""
    found: dict[str, Tensor] = {}
    stable = {name: metric for name, metric in metrics.items() if isinstance(metric, Stability)}
    # Together: those that draw the same neighbours explain them once.
    moves = dict(zip(stable, stabilities(list(stable.values()), system.interpreter, x, seen.prediction), strict=True))
    for name, metric in metrics.items():
        found[name] = moves[name] if name in moves else figure(metric, system, clean, x, benign, seen)
        if isinstance(metric, MapMetric):
            found |= {f"{name}_{to}": metric(seen.maps, maps) for to, maps in references.items()}
            if "goal" in references:
                goal = found[f"{name}_goal"]
                nearer = goal > found[name] if metric.higher_is_closer else goal < found[name]
                found[f"{name}_nearer"] = nearer.float()
    return found


def figure(metric: Metric, system: System, clean: Tensor, x: Tensor, benign: Tensor, seen: Explained) -> Tensor:
    """One metric of a cell's chunk, ``[B]``: of attacked inputs, for the class that is predicted on them.

    Args:
        metric: of a kind in :data:`robustexplain.metrics.JUDGED`, but for stability.
        system: what is judged.
        clean: benign inputs ``[B, C, H, W]``.
        x: attacked inputs.
        benign: maps of the benign inputs ``[B, H, W]``.
        seen: what the system says of the attacked inputs.
    """
    if isinstance(metric, MapScore):
        return metric(seen.maps)
    if isinstance(metric, Faithfulness):
        return metric(system.model, x, seen.maps, seen.prediction)
    if isinstance(metric, Visibility):
        return metric(clean, x)
    return _map_metric(metric)(seen.maps, benign)


def _map_metric(metric: Metric) -> MapMetric:
    assert isinstance(metric, MapMetric)  # the recipe lets no other kind through
    return metric
