"""The report's title and description of each measure, and which direction is good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..metrics import MapMetric, Metric


class Words(NamedTuple):
    """A measure's title, what it is, and whether ``high`` or ``low`` values speak for the defender, or ``neither``."""

    title: str
    what: str
    good: str


MEANS = ("success", "plausible", "plausible_iou", "joint", "joint_iou", "success_correct", "joint_correct", "alarm")
"""Measures of random systems that have a mean over draws beside the worst."""
MEASURES = {
    "joint": ("Joint success", "predicted as wanted, plausible map, no alarm", "low"),
    "joint_correct": (
        "Joint success where clean inputs are right",
        "among the inputs that the row's own classifier and the undefended one get right",
        "low",
    ),
    "success": ("Attack success (ASR)", "predicted as the adversary wants", "low"),
    "success_correct": (
        "Attack success where clean inputs are right",
        "among the inputs that the row's own classifier and the undefended one get right",
        "low",
    ),
    "correct": (
        "Clean inputs that are right",
        "share of the judged inputs that the row's own classifier gets right",
        "high",
    ),
    "confidence": ("Misclassification confidence (MC)", "probability of the class that the adversary wants", "low"),
    "plausible": ("Plausible map", "as near to the map that it should resemble as the recipe asks", "low"),
    "joint_iou": ("Joint success by IoU", "with the papers' measure: a map is plausible above 0.5", "low"),
    "plausible_iou": ("Plausible map by IoU", "IoU above 0.5 with the map that it should resemble", "low"),
    "distance": ("Distance to the map that it should resemble", "by the measure that decides plausibility", "neither"),
    "separation": (
        "Separation",
        "area under the ROC curve of that distance, attacked against harmless changes: the chance that an attacked map "
        "is further away; 0.5: nobody can tell, below: nearer than harmless changes",
        "neither",
    ),
    "queries": ("Queries", "inputs that the attack showed to the system", "neither"),
    "alarm": ("Detection rate", "share of inputs that raise the calibrated alarm", "high"),
    "auc": ("Area under the detector's ROC curve", "chance that an attacked input scores above a clean one", "high"),
    "l1": (
        "L1 to the benign map",
        "mean absolute difference of min-max rescaled maps; high shows that the map was changed",
        "neither",
    ),
    "l2": ("L2 to the benign map", "root mean square difference of min-max rescaled maps", "neither"),
    "certified_one": (
        "Certified as important",
        "share of a benign map's cells that stay important at every input within the certificate's radius; of the "
        "average over the noise, with the certificate's chance of error",
        "neither",
    ),
    "certified_zero": (
        "Certified as unimportant",
        "share of cells, likewise; large where few are kept",
        "neither",
    ),
    "certified_overlap": (
        "Certified overlap",
        "of a benign map's top cells, at least this share stays within the certificate's radius",
        "neither",
    ),
    "certified_radius": (
        "Radius of the certificate",
        "L2, in units of pixels in [0, 1]; 0: significance under the noise, and no statement about adversaries",
        "neither",
    ),
    "attacked_overlap": (
        "Attacked overlap",
        "of the certified top, the share that stayed, where the certificate says something of the attacked input",
        "neither",
    ),
    "contradicted": (
        "Certificates that contradict each other",
        "share of cells that the benign and the attacked map certify the other way round, where the attacked input is "
        "within the radius (and has the same prediction, if the certificate asks for it); above 0, but for the chance "
        "of error, a certificate is wrong",
        "low",
    ),
    "iou": ("IoU with the benign map", "of the rescaled maps, binarised", "neither"),
}


def words_of(metrics: Mapping[str, Metric]) -> dict[str, Words]:
    """The words of every measure that a cell can report, given its metrics by name."""
    known = {name: Words(*words) for name, words in MEASURES.items()}
    for name, metric in metrics.items():
        if name not in MEASURES:
            known[name] = _described(name, metric)
        elif name == "iou":
            title, what, good = MEASURES[name]
            known[name] = Words(title, f"{what} at {getattr(metric, 'threshold', 0.5)}", good)
    for name in MEANS:
        title, _, good = known[name]
        known[f"{name}_mean"] = Words(f"{title}, mean", "over the fresh draws on which a random system is judged", good)
    for name in metrics:
        known |= _other_maps(name, known[name].title)
    return known


def _described(name: str, metric: Metric) -> Words:
    """The words for a metric without an entry above, such as a third party's, from its docstring."""
    summary = (type(metric).__doc__ or name).strip().split("\n")[0].rstrip(".")
    if isinstance(metric, MapMetric):
        return Words(name, f"{summary}; against the benign map", "low" if metric.higher_is_closer else "high")
    return Words(name, f"{summary}; {metric.better} speaks for the explanation", "neither")


def _other_maps(name: str, title: str) -> dict[str, Words]:
    """The words for a metric computed against other maps than the benign ones."""
    short = title.partition(" ")[0]
    return {
        f"{name}_goal": Words(f"{short} to the goal map", "if the adversary has a goal map of its own", "neither"),
        f"{name}_nearer": Words(f"Nearer to the goal map, by {short}", "share nearer than to the benign map", "low"),
        f"{name}_honest": Words(f"{title}, of the honest system", "against the map of the system before", "neither"),
    }
