"""False flags of the audit: how many honest cells are flagged, and how many of these flags do not hold elsewhere.

Run it as ``python tests/benchmarks/false_flags.py OUT [--seeds 7] [--full 1] [--fashion ROOT]``. Small networks are
trained on digits and on Fashion-MNIST (``ROOT`` holds its files), each under another seed: five honest rows of each
(three undefended, two defended) under three attacks that are strong enough, audited cheaply; and the first ``--full``
networks once more, audited in full, under ``auto`` too.

A flag says something that can be checked again: it is called true where the same check raises it on the same systems
for three times as many other inputs, which neither training nor the flagged cell had, and false otherwise.

What must hold: cells with a false flag are at most 2% of all, of 200 or more.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustexplain import data as data_sets
from robustexplain import models, seals
from robustexplain.attacks import ADV2, PGD, Auto, MapPGD, Noise
from robustexplain.data import Data
from robustexplain.defenses import AggregatedInterpreter, BetaSmoothing
from robustexplain.evaluation import Evaluation, Results, evaluate
from robustexplain.evaluation.identity import JUDGED
from robustexplain.evaluation.statistics import share
from robustexplain.interpreters import CAM, GradCAM, Gradient
from robustexplain.recipe.auditing import Auditing
from robustexplain.recipe.experiment import Column, Row
from robustexplain.system import System
from robustexplain.training import Session, Training, cross_entropy, fit

EPS = {"digits": 0.125, "fashion-mnist": 0.1}
OTHERS = 3
"""How many other inputs a flag is checked on, for each that the cell had."""


@dataclass(frozen=True)
class Raised:
    """A flag of an honest cell.

    Args:
        run: where it stands.
        row: of the cell.
        column: of the cell.
        name: of the flag.
        reason: what it says.
        again: what it says of other inputs; ``None``: it is not raised there.
    """

    run: str
    row: str
    column: str
    name: str
    reason: str
    again: str | None = None


def networks(data: Data, epochs: int, seeds: int) -> list[nn.Module]:
    """Small networks, each trained under another seed."""
    found = []
    for seed in range(seeds):
        model = models.load("small-cnn", num_classes=data.num_classes, in_channels=data.shape[0], seed=seed)
        settings = Training(epochs=epochs, batch_size=64, lr=1e-2)
        fit(model, cross_entropy, data.train, settings, name="classifier", seed=seed, session=Session(), identity=[])
        found.append(model.requires_grad_(False).eval())
    return found


def systems_of(trained: Sequence[nn.Module]) -> dict[str, Any]:
    """Honest rows: three undefended and two defended ones of each network."""
    found: dict[str, Any] = {}
    for i, model in enumerate(trained):
        for name, build in (("gradient", Gradient), ("cam", CAM), ("gradcam", GradCAM)):
            found[f"{name} {i}"] = System(model, build(model))
        found[f"beta-smoothing {i}"] = (BetaSmoothing(beta=3)(found[f"gradient {i}"]), f"gradient {i}")
        aggregated = AggregatedInterpreter(["gradient", "gradcam"])(found[f"gradcam {i}"])
        found[f"aggregated {i}"] = (aggregated, f"gradcam {i}")
    return found


def attacks_of(eps: float, auto: bool) -> dict[str, Any]:
    """A control, and attacks of either aim that are strong enough."""
    found: dict[str, Any] = {
        "noise": Noise(eps=eps, kind="sign"),
        "pgd": PGD(eps=eps, steps=50),
        "adv2": (ADV2(eps=eps, steps=100), "adaptive"),
        "map-pgd, move": (MapPGD(eps=eps, aim="move"), "adaptive"),
    }
    return found | ({"auto": (Auto(eps=eps), "adaptive")} if auto else {})


def honest(results: Results) -> Iterator[tuple[Row, Column, dict[str, Any]]]:
    """The finished cells of attacks: neither unchanged inputs nor random ones."""
    for row in results.experiment.rows:
        for column in results.experiment.columns:
            cell = results.cells[row.label, column.label]
            if cell is not None and cell["status"] == "done" and not column.facts.control:
                yield row, column, cell


def flagged(name: str, results: Results) -> list[Raised]:
    """The flags of a run's honest cells."""
    return [
        Raised(name, row.label, column.label, flag["name"], flag["reason"])
        for row, column, cell in honest(results)
        for flag in cell["flags"]
    ]


@dataclass(frozen=True)
class Study:
    """Honest systems and the attacks that they meet.

    Args:
        data: the data set.
        systems: rows.
        attacks: columns.
        images: of a cell.
        audit: how cells are checked.
    """

    data: Data
    systems: dict[str, Any]
    attacks: dict[str, Any]
    images: int
    audit: Auditing

    def judged(self, out: Path) -> Results:
        """The matrix."""
        settings = Evaluation(images=self.images, batch_size=self.images, pictures=1)
        return evaluate(self.systems, self.attacks, self.data, out=out, evaluation=settings, audit=self.audit)

    def on_others(self, root: Path, found: Sequence[Raised]) -> Study:
        """The flagged rows and columns, what they are compared with, and inputs that the matrix in ``root`` had not."""
        judged = seals.read_or_none(root / JUDGED, "positions", "beyond")
        assert judged is not None
        used = {int(p) for p in (*judged["positions"], *judged["beyond"])}
        left = data_sets.subset(self.data.test, sorted(set(range(len(self.data.test))) - used))
        asked, columns = {flag.row for flag in found}, {flag.column for flag in found}
        asked |= {entry[1] for label, entry in self.systems.items() if label in asked and isinstance(entry, tuple)}
        return replace(
            self,
            data=replace(self.data, test=left, digest=f"{self.data.digest} others"),
            systems={label: entry for label, entry in self.systems.items() if label in asked},
            attacks={label: entry for label, entry in self.attacks.items() if label in columns or label == "noise"},
            images=OTHERS * self.images,
            audit=replace(self.audit, images=OTHERS * self.audit.images),
        )


def checked(study: Study, out: Path, name: str) -> tuple[int, list[Raised]]:
    """How many honest cells there are, and their flags, with what they say of other inputs."""
    results = study.judged(out / name)
    found = flagged(name, results)
    cells = len(list(honest(results)))
    print(f"{name}: {cells} cells, {len(found)} flags", flush=True)
    if not found:
        return cells, []
    again = study.on_others(out / name, found).judged(out / f"{name} again")
    known = {(f.row, f.column, f.name): f.reason for f in flagged("", again)}
    return cells, [replace(f, again=known.get((f.row, f.column, f.name))) for f in found]


def as_markdown(cells: int, found: Sequence[Raised]) -> str:
    """Every flag, then the counts."""
    text = ["| run | cell | flag | reason | on other inputs |", "| --- | --- | --- | --- | --- |"]
    text += [
        f"| {f.run} | {f.row} / {f.column} | {f.name} | {f.reason} | {f.again or '**not raised**'} |" for f in found
    ]
    false = {(f.run, f.row, f.column) for f in found if f.again is None}
    rate = share((torch.arange(cells) < len(false)).float())
    names = Counter((f.name, "true" if f.again else "false") for f in found)
    text.append(
        f"\n{cells} cells, {len({(f.run, f.row, f.column) for f in found})} flagged; with a false flag {len(false)}: "
    )
    text[-1] += f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
    return "\n".join([*text, *(f"- {name}: {count} {verdict}" for (name, verdict), count in sorted(names.items()))])


def main() -> None:
    """Make the matrices, check their flags, print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--full", type=int, default=1)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--fashion")
    parser.add_argument("--data", nargs="*", default=["digits", "fashion-mnist"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells, found = 0, []
    for name in given.data:
        digits = name == "digits"
        # Most of the official train part is left to nobody: a few thousand images are enough for a small network.
        known = {"fractions": (0.5, 0.1, 0.4)} if digits else {"root": given.fashion, "defense_share": 0.95}
        data = data_sets.load(name, size=16, **known)
        trained = networks(data, 8 if digits else 3, given.seeds)
        cheap = Study(data, systems_of(trained), attacks_of(EPS[name], False), given.images, Auditing())
        full = replace(
            cheap,
            systems=systems_of(trained[: given.full]),
            attacks=attacks_of(EPS[name], True),
            audit=Auditing(level="full"),
        )
        for study, words in ((cheap, "cheap"), *([(full, "full")] if given.full else [])):
            more, flags = checked(study, given.out, f"{name} {words}")
            cells, found = cells + more, found + flags
            print(as_markdown(cells, found), flush=True)


if __name__ == "__main__":
    main()
