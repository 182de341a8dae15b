"""The measurements of a cell on one chunk of images: tensors, one value a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import Attack, random_class_maps, random_patch_maps
from ..metrics import Cell, MapMetric, Metric, confidence, hit, joint_success
from ..random_streams import derive
from ..recipe.experiment import Column
from ..recipe.plausible import PAPERS
from ..system import System
from .calibration import distance_of
from .certified import certified
from .judged import Chunk, Pool

SEARCH = ("zero_direction", "stalled", "surrogate_misled", "queries")
"""The figures that a search reports about itself, one a sample."""
JUDGED = 5
"""How often a random system is judged."""
WON = ("success", "plausible", "plausible_iou", "joint", "joint_iou", "success_correct", "joint_correct")
"""What an attacker wins, 0 or 1 a sample."""


@dataclass(frozen=True)
class Rule:
    """What makes a map plausible: a distance of at most a row's limit, or else an IoU.

    Args:
        distance: the metric; ``None``: none is measured.
        limit: the largest distance of a plausible map; ``None``: the IoU decides.
        iou: what the IoU must exceed; where the distance decides, the papers' stands beside it.
    """

    distance: MapMetric | None
    limit: float | None
    iou: float = PAPERS


@dataclass(frozen=True, eq=False)
class Trial:
    """A chunk of attacked inputs and the system of a row that is evaluated on them.

    Args:
        system: the system that is evaluated.
        attack: the attack that computed the inputs.
        chunk: the benign inputs and the goals.
        made: the result of :func:`craft` for them.
        reference: the undefended classifier of the row; the system's own if its defenses do not change it.
        honest: the system before it was manipulated, where it was.
    """

    system: System
    attack: Attack
    chunk: Chunk
    made: Mapping[str, Tensor]
    reference: nn.Module
    honest: System | None = None

    @property
    def cell(self) -> Cell:
        """The data for the metrics; every input is explained here, once."""
        clean = self.chunk.x
        x = self.made["x"].to(clean)
        benign = self.system(clean)
        # Unchanged inputs are not explained twice: LIME and KernelSHAP take thousands of passes.
        seen = benign if torch.equal(x, clean) else self.system(x)
        references = {}
        if "goal_map" in self.made:
            references["goal"] = self.made["goal_map"].to(benign.maps)
        if self.honest is not None:
            references["honest"] = self.honest(clean).maps
        return Cell(self.system, clean, x, benign, seen, references)

    def right(self, cell: Cell) -> tuple[Tensor, Tensor]:
        """Bool ``[B]``: where the row's classifier gets the benign input right, and where the undefended one does."""
        own = cell.benign.prediction == self.chunk.y
        same = self.system.model is self.reference
        return own, own if same else self.reference(cell.clean).argmax(1) == self.chunk.y


def goal_map(column: Column, system: System, chunk: Chunk, pool: Pool, seed: int) -> Tensor | None:
    """The goal map of the column's adversary; ``None`` is the benign map."""
    if column.goal_map == "random-patch":
        return random_patch_maps(chunk.x, derive(seed, "patch"))
    if column.goal_map == "random-class":
        other = chunk.y if chunk.goal_class is None else chunk.goal_class
        return random_class_maps(system.interpreter, chunk.x, other, pool.x, pool.y, derive(seed, "pool"))
    default: Tensor | None = column.attack.default_goal_map(chunk.x)
    return default


def craft(attack: Attack, system: System, chunk: Chunk, wanted: Tensor | None) -> dict[str, Tensor]:
    """Attacked inputs of a chunk, and the figures of the search (``SEARCH``)."""
    goal_class = None if attack.keeps_prediction else chunk.goal_class
    made = attack(system, chunk.x, chunk.y, goal_class, wanted)
    arrays = {"x": made.x} | {name: getattr(made, name).float() for name in SEARCH}
    if made.member is not None:
        arrays["member"] = made.member
    return arrays if wanted is None else {**arrays, "goal_map": wanted}


@torch.no_grad()
def measure(trial: Trial, metrics: Mapping[str, Metric], rule: Rule, seed: int = 0) -> dict[str, Tensor]:
    """Everything a cell reports of a chunk, ``[B]`` each, and ``x``, ``attacked_x`` and the maps for the pictures.

    The map that an attack must resemble to be plausible is its goal map: the benign map, or the one it was given
    (``distance`` is to that map). An attack on the explanation alone succeeds where the prediction stays and the map no
    longer resembles the benign one.
    Map metrics are also computed against a goal map that was given (``l1_goal``; ``l1_nearer`` is 1 where it is
    nearer than the benign map) and against the honest system's maps (``l1_honest``).

    ``correct`` is 1 where the row's own classifier gets the benign input right. ``success_correct`` and
    ``joint_correct`` are success and joint success where it and the undefended classifier do, NaN elsewhere: a
    hardened classifier's errors on benign inputs are no success of the attacker.

    Args:
        trial: system and inputs.
        metrics: by name; ``iou`` among them.
        rule: decides what is plausible.
        seed: of the draws of a system that is random. It is judged ``JUDGED`` times on fresh draws, which no attacker
            has seen; the attacker's best draw counts (``joint``), and the mean stands beside it (``joint_mean``);
            everything else is of the first of these draws.
    """
    if not trial.system.random:
        return _measured(trial, metrics, rule)
    drawn = [trial.system.redrawn(derive(seed, "judge", i)) for i in range(JUDGED)]
    return _worst_of([_measured(replace(trial, system=system), metrics, rule) for system in drawn])


def _worst_of(draws: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The arrays of the first draw, with the worst of all for the defender where something is won or rings."""
    arrays = dict(draws[0])
    for name in (n for n in (*WON, "alarm") if n in arrays):
        values = torch.stack([draw[name] for draw in draws])
        # NaN: not counted under these draws.
        worst = values.nan_to_num(1).amin(0) if name == "alarm" else values.nan_to_num(-1).amax(0)
        arrays[name] = torch.where(values.isnan().all(0), torch.nan, worst)
        arrays[f"{name}_mean"] = values.nanmean(0)
    return arrays


def _measured(trial: Trial, metrics: Mapping[str, Metric], rule: Rule) -> dict[str, Tensor]:
    cell = trial.cell
    arrays = {"sample": trial.chunk.samples, "label": trial.chunk.y} | _verdict(trial, cell, metrics["iou"], rule)
    if "goal" in cell.references:
        arrays["goal_map"] = cell.references["goal"]
    # Of an infinite value there is no mean: the measure is undefined there.
    found = figures(metrics, cell)
    arrays |= {name: torch.where(value.isinf(), torch.nan, value) for name, value in found.items()} | certified(cell)
    if cell.seen.score is not None and cell.seen.alarm is not None and cell.benign.score is not None:
        arrays |= {"score": cell.seen.score, "alarm": cell.seen.alarm.float(), "clean_score": cell.benign.score}
    own, undefended = trial.right(cell)
    arrays["correct"] = own.float()
    for name in ("success", "joint"):
        arrays[f"{name}_correct"] = torch.where(own & undefended, arrays[name], torch.nan)
    return {name: value.cpu() for name, value in arrays.items()}


def _verdict(trial: Trial, cell: Cell, iou: Any, rule: Rule) -> dict[str, Tensor]:
    """The attacker's success, the figures of its search, and the inputs and maps for the pictures."""
    benign, seen, chunk, attack = cell.benign, cell.seen, trial.chunk, trial.attack
    goal_class = benign.prediction if attack.keeps_prediction else chunk.goal_class
    success = hit(seen.logits, chunk.y, goal_class)
    wanted, others = cell.references.get("goal", benign.maps), {}
    plausible = (iou(seen.maps, wanted) > rule.iou) ^ attack.moves_map
    if rule.distance is not None:
        others["distance"] = distance_of(rule.distance, seen.maps, wanted)
    if rule.limit is not None:
        others["plausible_iou"] = plausible.float()
        others["joint_iou"] = joint_success(success, plausible, seen.alarm).float()
        plausible = (others["distance"] <= rule.limit) ^ attack.moves_map
    arrays = others | {
        "prediction": seen.prediction,
        "success": success.float(),
        "confidence": confidence(seen.logits, chunk.y, goal_class),
        "plausible": plausible.float(),
        "joint": joint_success(success, plausible, seen.alarm).float(),
        **{name: trial.made[name] for name in (*SEARCH, "member") if name in trial.made},
        "perturbation": (cell.attacked - cell.clean).flatten(1).abs().amax(1),
        "x": cell.clean,
        "attacked_x": cell.attacked,
        "map": benign.maps,
        "attacked_map": seen.maps,
    }
    return arrays if goal_class is None else {**arrays, "goal_class": goal_class}


def figures(metrics: Mapping[str, Metric], cell: Cell) -> dict[str, Tensor]:
    """Every metric of a cell's chunk, ``[B]``; those of maps to each of its references too, as ``l1_goal``."""
    kinds: dict[Any, list[str]] = {}
    for name, metric in metrics.items():
        kinds.setdefault(type(metric).all_of_cell.__func__, []).append(name)  # type: ignore[attr-defined]
    plain: dict[str, Tensor] = {}
    for names in kinds.values():
        some = [metrics[name] for name in names]
        plain |= zip(names, type(some[0]).all_of_cell(some, cell), strict=True)
    found: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        found[name] = plain[name]
        found |= {f"{name}_{to}": value for to, value in metric.against_references(cell).items()}
    return found
