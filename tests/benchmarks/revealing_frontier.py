"""The frontier of revealing training: accuracy against what forged maps show, with ``weight`` as parameter.

Run it as ``python tests/benchmarks/revealing_frontier.py FIGURES.jsonl PICTURE.png [--weights 0 2 4 8] [--images 40]
[--seed 0]``,
on digits (``small-cnn``, eps 0.125) or with ``--data fashion-mnist [--root FOLDER]`` (``small-resnet``, eps 0.1, 1,500
training and 1,000 test images). A network is trained, fine-tuned with each weight, and attacked by ``auto``; the seed
is that of the network and of its trainings. A line is appended for each weight, and all lines of the file are drawn,
lines of one weight by their mean; ``--weights`` without a value only draws.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

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

HARMLESS = (UniformNoise(1 / 16), Compression(), Brightness())
JUDGED_BY = (UniformNoise(), Compression(), Brightness())
NEAREST = 3


@dataclass(frozen=True)
class Case:
    """On what the frontier is drawn.

    Args:
        model: name of the network.
        plain: how it is trained, on all training images.
        attack: the forger in the fine-tuning; its eps is ``auto``'s, too.
        training: the fine-tuning.
        train, test: how many images are used; ``None`` for all.
    """

    model: str
    plain: Training
    attack: ADV2
    training: Training
    train: int | None = None
    test: int | None = None


CASES = {
    "digits": Case(
        "small-cnn",
        Training(epochs=8, batch_size=64, lr=1e-2),
        ADV2(0.125, steps=12, step_size=0.025, warm_start=0.5),
        Training(epochs=5, batch_size=64, lr=1e-3, weight_decay=0.0),
    ),
    "fashion-mnist": Case(
        "small-resnet",
        Training(epochs=2, batch_size=128, lr=1e-2),
        ADV2(0.1, steps=8, step_size=0.03, warm_start=0.5),
        Training(epochs=3, batch_size=64, lr=1e-3, weight_decay=0.0),
        train=1500,
        test=1000,
    ),
}


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
        seed: of the network and its trainings.
    """

    weight: float
    images: int
    accuracy: float
    joint: float
    separation: float
    class_share: float
    unseen: float
    planted: float
    seed: int = 0


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


def measured(weight: float, model: nn.Module, root: nn.Module, data: Data, images: int, eps: float) -> Point:
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
    forged = Auto(eps).informed(told)(system, x, y, goal).x
    proof = prove(Auto(eps), system, plant(system, x, eps))
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


def cut(data: Data, case: Case) -> Data:
    """The data with as many images as the fine-tuning and the judging use, of each class alike."""
    train = data.train if case.train is None else data_sets.take(data.train, case.train)
    test = data.test if case.test is None else data_sets.take(data.test, case.test)
    return replace(data, train=train, test=test)


def mean(points: Sequence[Point], figure: str) -> float:
    """Of a figure over trainings."""
    return fmean(getattr(point, figure) for point in points)


def drawn(points: Sequence[Point], path: Path) -> None:
    """The figures over the weight, as a picture: a dot for each training, a line through the means."""
    from matplotlib.figure import Figure

    weights = sorted({point.weight for point in points})
    groups = [[point for point in points if point.weight == weight] for weight in weights]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([p.accuracy for p in points], [p.separation for p in points], "o", color="#22607a", alpha=0.45, ms=4)
    middles = [(mean(group, "accuracy"), mean(group, "separation")) for group in groups]
    left.plot(*zip(*middles, strict=True), "o-", color="#22607a")
    for place, (weight, where) in enumerate(zip(weights, middles, strict=True)):
        apart = (6, -12) if place % 2 else (6, 6)
        left.annotate(f"W {weight:g}", where, textcoords="offset points", xytext=apart, fontsize=8)
    left.set(xlabel="accuracy", ylabel="separation against auto", ylim=(0, 1.03))
    left.invert_xaxis()
    places = range(len(weights))
    for name, style in (("separation", "o-"), ("joint", "s--"), ("class_share", "^-"), ("unseen", "v:")):
        right.plot(places, [mean(group, name) for group in groups], style, label=name.replace("_", " "))
    right.set_xticks(list(places), [f"{weight:g}" for weight in weights])
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
    parser.add_argument("--data", choices=sorted(CASES), default="digits")
    parser.add_argument("--root", help="folder of Fashion-MNIST's files, if it is not where it is looked for")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    case = CASES[given.data]
    if given.weights:
        whole = data_sets.load(given.data, root=given.root)
        data = cut(whole, case)
        shape = data.test[0][0].shape
        root = models.build(case.model, num_classes=10, in_channels=shape[0], seed=given.seed)
        fit(root, cross_entropy, whole.train, case.plain, name="classifier", seed=given.seed)
        root.eval().requires_grad_(False)
    for weight in given.weights:
        defense = Revealing(
            ("cam",), weight=weight, attack=case.attack, training=case.training, harmless=HARMLESS, seed=given.seed
        )
        model = defense.hardened(root, data.train) if weight else root
        point = replace(measured(weight, model, root, data, given.images, case.attack.eps), seed=given.seed)
        print(point, flush=True)
        with given.figures.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(point)) + "\n")
    lines = given.figures.read_text(encoding="utf-8").splitlines()
    drawn([Point(**json.loads(line)) for line in lines], given.picture)


if __name__ == "__main__":
    main()
