"""The frontier of revealing training on digits: accuracy against what forged maps show, with ``weight`` as parameter.

Run it as ``python tests/benchmarks/revealing_frontier.py FIGURES.jsonl PICTURE.png [--weights 0 2 4 8] [--images 40]``.
A small network is trained, fine-tuned with each weight, and attacked by ``auto`` (eps 0.125). A line is appended for
each weight, and all lines of the file are drawn; ``--weights`` without a value only draws.

Four figures belong together. *Separation* is the smallest AUC over the harmless changes, of forged against honest
maps, each compared with the map of its own benign input. *Joint* is the share of forgeries within the row's limit.
*Class share* is the share of the maps' variance that the predicted class explains: maps that are one picture a class
separate perfectly and say nothing of the input. *Unseen* is the AUC of an observer without the benign map: the distance
to the three nearest honest maps of the predicted class.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustexplain import data as data_sets
from robustexplain import maps as ops
from robustexplain import models
from robustexplain.attacks import ADV2, Auto, Known, random_classes
from robustexplain.data import Data
from robustexplain.defenses import Revealing
from robustexplain.evaluation.calibration import conformal_quantile
from robustexplain.evaluation.planted import plant, prove
from robustexplain.interpreters import CAM
from robustexplain.metrics import L1, auc
from robustexplain.system import Explained, System
from robustexplain.training import Training, cross_entropy, fit
from robustexplain.transforms import Brightness, Compression, UniformNoise

EPS = 0.125
ATTACK = ADV2(EPS, steps=12, step_size=0.025, warm_start=0.5)
TRAINING = Training(epochs=5, batch_size=64, lr=1e-3, weight_decay=0.0)
HARMLESS = (UniformNoise(1 / 16), Compression(), Brightness())
JUDGED_BY = (UniformNoise(), Compression(), Brightness())
NEAREST = 3


@dataclass(frozen=True)
class Point:
    """A network of the frontier.

    Args:
        weight: ``W``; 0 is the network that was not fine-tuned.
        images: attacked ones.
        accuracy: on the test part.
        joint: share of forgeries within the row's limit.
        separation: smallest AUC over the harmless changes.
        class_share: share of the maps' variance that the predicted class explains.
        unseen: AUC without the benign map.
        planted: share of planted maps that ``auto`` finds.
    """

    weight: float
    images: int
    accuracy: float
    joint: float
    separation: float
    class_share: float
    unseen: float
    planted: float


def class_share(seen: Explained) -> float:
    """The share of the variance of maps that is between predicted classes."""
    maps = ops.minmax(seen.maps)
    total = (maps - maps.mean(0)).square().sum()
    classes = [maps[seen.prediction == label] for label in seen.prediction.unique()]
    within = torch.stack([(some - some.mean(0)).square().sum() for some in classes]).sum()
    return float(1 - within / total)


def strangeness(seen: Explained, known: Explained) -> Tensor:
    """``[B]``: mean distance of a map to the nearest known ones of its predicted class."""
    maps, others = ops.minmax(seen.maps).flatten(1), ops.minmax(known.maps).flatten(1)
    found = []
    for one, label in zip(maps, seen.prediction, strict=True):
        of_class = (others[known.prediction == label] - one).abs().mean(1)
        found.append(of_class.topk(min(NEAREST, len(of_class)), largest=False).values.mean())
    return torch.stack(found)


def measured(weight: float, model: nn.Module, root: nn.Module, data: Data, images: int) -> Point:
    """What a network of the frontier reaches."""
    system, before = System(model, CAM(model)), System(root, CAM(root))
    inputs, labels = data_sets.stack(data.test)
    x, y, others = inputs[:images], labels[:images], inputs[images : images + 200]
    goal, apart = random_classes(x, y, 10), L1()
    with torch.no_grad():
        every, honest, benign = system(inputs), system(others), system(x)
        known = system(data_sets.stack(data.train)[0])
        drifts = []
        for change in JUDGED_BY:
            changed = system(change(others, 7))
            drifts.append(apart(changed.maps, honest.maps)[changed.prediction == honest.prediction])
    limit = max(conformal_quantile(drift, 0.95) for drift in drifts)
    told = Known(limit=limit, root=None if root is model else before)
    forged = Auto(EPS).informed(told)(system, x, y, goal).x
    proof = prove(Auto(EPS), system, plant(system, x, EPS))
    with torch.no_grad():
        seen = system(forged)
    won, distance = seen.prediction == goal, apart(seen.maps, benign.maps)
    strange = strangeness(seen, known)[won]
    return Point(
        weight,
        images,
        accuracy=float((every.prediction == labels).float().mean()),
        joint=float((won & (distance <= limit)).float().mean()),
        separation=min(auc(drift, distance) for drift in drifts),
        class_share=class_share(every),
        unseen=auc(strangeness(honest, known), strange),
        planted=0.0 if proof is None else float(proof.found.float().mean()),
    )


def trained(data: Data) -> nn.Module:
    """The quickstart's kind of network."""
    model = models.build("small-cnn", num_classes=10, in_channels=1, seed=0)
    fit(model, cross_entropy, data.train, Training(epochs=8, batch_size=64, lr=1e-2), name="classifier", seed=0)
    return model.eval().requires_grad_(False)


def drawn(points: Sequence[Point], path: Path) -> None:
    """The figures over the weight, as a picture."""
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point.weight)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([p.accuracy for p in points], [p.separation for p in points], "o-", color="#22607a")
    for point in points:
        where = (point.accuracy, point.separation)
        left.annotate(f"W {point.weight:g}", where, textcoords="offset points", xytext=(6, -10), fontsize=8)
    left.set(xlabel="accuracy", ylabel="separation against auto", ylim=(0, 1.03))
    left.invert_xaxis()
    places = range(len(points))
    for name, style in (("separation", "o-"), ("joint", "s--"), ("class_share", "^-"), ("unseen", "v:")):
        right.plot(places, [getattr(point, name) for point in points], style, label=name.replace("_", " "))
    right.set_xticks(list(places), [f"{point.weight:g}" for point in points])
    right.set(xlabel="weight W (0: as it was)", ylim=(0, 1.03))
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--weights", type=float, nargs="*", default=[0.0, 2.0, 4.0, 8.0])
    parser.add_argument("--images", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.weights:
        data = data_sets.load("digits")
        root = trained(data)
    for weight in given.weights:
        defense = Revealing(("cam",), weight=weight, attack=ATTACK, training=TRAINING, harmless=HARMLESS)
        model = defense.hardened(root, data.train) if weight else root
        point = measured(weight, model, root, data, given.images)
        print(point, flush=True)
        with given.figures.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(point)) + "\n")
    lines = given.figures.read_text(encoding="utf-8").splitlines()
    drawn([Point(**json.loads(line)) for line in lines], given.picture)


if __name__ == "__main__":
    main()
