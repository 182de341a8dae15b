"""Is ``auto`` as strong as every single attack of its aim and eps? A table over the rows of a run directory.

    PYTHONPATH=. python tests/benchmarks/auto_against_the_zoo.py --run runs/quickstart --eps 0.125 --images 100

An attacker wins a sample as the matrix judges it. ``forge``: predicted as wanted, no alarm, and the map no further from
the benign one than the row's calibrated limit. ``move``: the prediction stays, no alarm, and the map is beyond that
limit. ``match``: the goals are planted ones (maps known to be reachable); the prediction stays, no alarm that did not
ring there, and the map ends at half the benign map's distance to the goal or nearer.

Single attacks are adapted to the row as ``auto`` is, and run where ``auto`` did not win: what they win there is the
last column, and their own joint success is at most the sum. With ``--everywhere`` they run on all samples. Lines that
stand in ``--out`` already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import robustexplain as rx
from robustexplain import attacks, data
from robustexplain.attacks import Attack, Known
from robustexplain.attacks.joint.aimed import Aim
from robustexplain.evaluation.planted import plant
from robustexplain.evaluation.store import RunFolder
from robustexplain.random_streams import derive
from robustexplain.recipe.experiment import Recipe
from robustexplain.recipe.reader import read

AIMS: tuple[Aim, ...] = ("forge", "move", "match")


def zoo(aim: Aim, eps: float, long: int, restarts: int) -> dict[str, Attack]:
    """The attacks of the zoo with this aim in an L-infinity ball; the last ones with many steps and restarts."""
    step = eps / 8
    again = {"eps": eps, "steps": long, "restarts": restarts}
    if aim == "forge":
        return {
            "noise": attacks.Noise(eps, kind="sign"),
            "fgsm": attacks.FGSM(eps),
            "bim": attacks.BIM(eps, steps=100, step_size=eps / 50),
            "mi-fgsm": attacks.MIFGSM(eps, steps=100),
            "pgd": attacks.PGD(eps, steps=100),
            "square": attacks.Square(eps, max_queries=1000),
            "nes, joint": attacks.NES(eps, max_queries=2000, joint=True, weight=100.0),
            "spsa, joint": attacks.SPSA(eps, samples=50, max_queries=2000, joint=True, weight=100.0),
            "adv2, 100 steps": attacks.ADV2(eps, steps=100),
            "adv2, 10x weight, 100 steps": attacks.ADV2(eps, steps=100, weight=100.0, confidence=0.0, step_size=step),
            "adv2, h(z), 100 steps": attacks.ADV2(eps, steps=100, surrogate="smooth_gradient"),
            "adv2, long": attacks.ADV2(**again),
            "adv2, 10x weight, long": attacks.ADV2(**again, weight=100.0),
            "adv2, 10x weight, eps/8, long": attacks.ADV2(**again, weight=100.0, confidence=0.0, step_size=step),
            "map-pgd, long": attacks.MapPGD(**again),
        }
    if aim == "move":
        return {
            "ghorbani-random": attacks.GhorbaniRandom(eps),
            "ghorbani-topk": attacks.GhorbaniTopK(eps),
            "ghorbani-center": attacks.GhorbaniCenter(eps),
            "ghorbani-topk, long": attacks.GhorbaniTopK(**again),
            "ghorbani-center, long": attacks.GhorbaniCenter(**again),
            "map-pgd, long": attacks.MapPGD(**again, aim="move"),
        }
    return {
        "evolution": attacks.Evolution(eps, steps=100),
        "dombrowski": attacks.Dombrowski(eps, steps=long),
        "ghorbani-region": attacks.GhorbaniRegion(eps),
        "adv2, long": attacks.ADV2(**again),
        "adv2, 10x weight, long": attacks.ADV2(**again, weight=100.0),
        "map-pgd, long": attacks.MapPGD(**again, aim="match"),
    }


@dataclass(frozen=True, eq=False)
class Case:
    """Samples of a row, and what wins one of them.

    Args:
        system: of the row.
        aim: of the attackers.
        x: ``[B, C, H, W]``.
        y: labels ``[B]``; under ``match`` the benign prediction.
        goal_class: ``[B]``, under ``forge``.
        goal_map: ``[B, H, W]``, under ``match``.
        rung: ``[B]`` bool, where an alarm does not count, since it rings at the planted input.
        known: how maps are judged.
    """

    system: rx.System
    aim: Aim
    x: Tensor
    y: Tensor
    goal_class: Tensor | None
    goal_map: Tensor | None
    rung: Tensor
    known: Known

    def some(self, rows: Tensor) -> Case:
        """The samples at ``rows``."""
        cut = {name: getattr(self, name)[rows] for name in ("x", "y", "rung")}
        cut |= {n: None if getattr(self, n) is None else getattr(self, n)[rows] for n in ("goal_class", "goal_map")}
        limit = self.known.limit
        return replace(self, **cut, known=replace(self.known, limit=limit[rows] if torch.is_tensor(limit) else limit))

    def run(self, attack: Attack) -> tuple[Tensor, attacks.Attacked]:
        """Where the attack wins, bool ``[B]``, and what it found."""
        label, goal = self.y, self.goal_class
        if self.aim == "match" and not attack.keeps_prediction:
            with torch.no_grad():
                label, goal = (self.y + 1) % self.system(self.x[:1]).logits.shape[1], self.y
        made = attack.adapted(self.system).informed(self.known)(self.system, self.x, label, goal, self.goal_map)
        return self.won(made.x), made

    @torch.no_grad()
    def won(self, x: Tensor) -> Tensor:
        """Where ``x`` ``[B, ...]`` wins, bool ``[B]``."""
        benign, seen = self.system(self.x), self.system(x)
        wanted = benign.maps if self.goal_map is None else self.goal_map
        near = self.known.apart(seen.maps, wanted) <= self.known.limit
        prediction = benign.prediction if self.goal_class is None else self.goal_class
        quiet = torch.ones_like(near) if seen.alarm is None else ~seen.alarm | self.rung
        return (seen.prediction == prediction) & (near ^ (self.aim == "move")) & quiet


def case(folder: RunFolder, recipe: Recipe, label: str, aim: Aim, eps: float, images: int, part: str) -> Case:
    """The samples of a row of a run: the judged ones, or others from the defense part."""
    row, metric = recipe.row(label), recipe.evaluation.plausible.metric
    system = rx.System.load(folder.system(label))
    root = None if row.label == row.root else rx.System.load(folder.system(row.root)).without_detector()
    loaded = recipe.data.load()
    if part == "defense":
        samples = loaded.defense
        positions = list(data.take(samples, images, recipe.seed).indices)
    else:
        samples = loaded.test
        positions = json.loads((folder.root / "judged.json").read_text())["positions"][:images]
    x, y = data.stack(samples, positions)
    nobody = torch.zeros(len(x), dtype=torch.bool)
    if aim == "match":
        found = plant(system, x, eps, distance=metric)
        known = Known(metric, found.start / 2, root)
        return Case(system, aim, found.x, found.prediction, None, found.maps, found.alarm, known)
    limit = json.loads(folder.calibration(label).read_text())["limit"]
    goal = attacks.random_classes(x, y, loaded.num_classes, derive(recipe.seed, "goal")) if aim == "forge" else None
    return Case(system, aim, x, y, goal, None, nobody, Known(metric, limit, root))


def measure(samples: Case, key: str, attack: Attack, known: dict[str, Any] | None) -> dict[str, Any]:
    """One line: which samples the attack wins, of those that it was tried on."""
    start, tried = time.time(), list(range(len(samples.x)))
    if known is not None:
        tried = [i for i in tried if i not in known["won"]]
    won, made = samples.some(torch.tensor(tried, dtype=torch.int64)).run(attack) if tried else (torch.zeros(0), None)
    wins = [tried[i] for i in won.nonzero()[:, 0].tolist()]
    line = {"key": key, "samples": len(samples.x), "tried": tried, "won": wins}
    if made is not None and made.member is not None and isinstance(attack, attacks.Auto):
        line |= {"member": [attack.names[m] if m >= 0 else "none" for m in made.member.tolist()]}
        line |= {"queries": made.queries.tolist()}
    return line | {"seconds": round(time.time() - start, 1)}


def added(line: dict[str, Any]) -> str:
    """What each member won that those before it had not."""
    counts = Counter(line["member"][line["tried"].index(i)] for i in line["won"])
    return ", ".join(f"{name} {count}" for name, count in counts.items()) + f"; queries at most {max(line['queries'])}"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--run", type=Path, required=True, help="run directory")
    made.add_argument("--eps", type=float, required=True)
    made.add_argument("--images", type=int, default=20)
    made.add_argument("--rows", nargs="*", help="default: all")
    made.add_argument("--aims", nargs="*", default=list(AIMS), choices=AIMS)
    made.add_argument("--attacks", nargs="*", help="default: all; none: auto alone")
    made.add_argument("--part", default="test", choices=("test", "defense"), help="to tune on: defense")
    made.add_argument("--steps", type=int, default=1000, help="of the long attacks")
    made.add_argument("--restarts", type=int, default=3, help="of the long attacks")
    made.add_argument("--everywhere", action="store_true", help="single attacks on samples that auto won, too")
    made.add_argument("--out", type=Path, help="lines are kept here, and not measured again")
    return made


def main() -> None:
    """Measure, and print the table."""
    asked = parser().parse_args()
    warnings.simplefilter("ignore")
    folder, recipe = RunFolder(asked.run), read(asked.run / "recipe.yaml")
    before = asked.out.read_text().splitlines() if asked.out is not None and asked.out.is_file() else []
    lines = {line["key"]: line for line in map(json.loads, before)}
    print(f"{'row':26s} {'aim':6s} {'attack':30s} {'tried':>5s} {'won':>5s} {'auto':>5s} {'auto lost':>9s} {'s':>6s}")
    for label in asked.rows or [row.label for row in recipe.rows]:
        for aim in asked.aims:
            samples = case(folder, recipe, label, aim, asked.eps, asked.images, asked.part)
            tried: dict[str, Attack] = {"auto": attacks.Auto(asked.eps, aim)}
            single = zoo(aim, asked.eps, asked.steps, asked.restarts)
            tried |= {n: a for n, a in single.items() if asked.attacks is None or n in asked.attacks}
            auto: dict[str, Any] = {}
            for name, attack in tried.items():
                everywhere = asked.everywhere or name == "auto"
                setting = f"{asked.eps} {asked.images} {asked.part} {asked.steps} {asked.restarts} {everywhere}"
                key = f"{label} | {aim} | {name} | {setting}"
                line = lines.get(key) or measure(samples, key, attack, None if everywhere else auto)
                if key not in lines and asked.out is not None:
                    with asked.out.open("a") as out:
                        out.write(json.dumps(line) + "\n")
                auto = line if name == "auto" else auto
                lost = sorted(set(line["won"]) - set(auto["won"]))
                figures = f"{len(line['tried']):5d} {len(line['won']):5d} {len(auto['won']):5d} {len(lost):9d}"
                last = added(line) if "member" in line else lost or ""
                print(f"{label:26s} {aim:6s} {name:30s} {figures} {line['seconds']:6.0f}  {last}", flush=True)


if __name__ == "__main__":
    main()
