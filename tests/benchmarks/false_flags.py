"""False flags of the audit: how many honest cells are flagged, and how many of these flags do not hold elsewhere.

Run it as ``python tests/benchmarks/false_flags.py OUT [--seeds 7] [--full 1] [--auto 1] [--fashion ROOT]``. Small
networks are trained on digits and on Fashion-MNIST (``ROOT`` holds its files), each seed another training, split
and choice of inputs: five honest rows (three undefended, two defended) under attacks that are strong enough. The first
``--full`` seeds of each data set are audited in full, and the first ``--auto`` seeds have a column ``auto``.
``--run RUN`` adds the cells of a finished run, such as one of the quickstart.

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

from robustexplain import data as data_sets
from robustexplain import seals
from robustexplain.attacks import Attack
from robustexplain.evaluation import RunFolder, evaluate, run
from robustexplain.evaluation.identity import JUDGED
from robustexplain.evaluation.results import Results
from robustexplain.evaluation.statistics import share
from robustexplain.recipe import check, check_data
from robustexplain.recipe.experiment import Column, Recipe, Row
from robustexplain.system import System
from robustexplain.training import Session

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


def recipe(data: str, seed: int, *, full: bool, auto: bool, root: str | None, images: int) -> Recipe:
    """A small matrix of honest cells."""
    eps = EPS[data]
    digits = {"name": "digits", "seed": seed, "size": 16, "fractions": [0.5, 0.1, 0.4]}
    # Most of the official train part is left to nobody: a few thousand images are enough for a small network.
    fashion = {
        "name": "fashion-mnist",
        "seed": seed,
        "size": 16,
        "defense_share": 0.9,
        **({"root": root} if root else {}),
    }
    attacks: list[Any] = [
        "clean",
        {"name": "noise", "eps": eps, "kind": "sign"},
        {"name": "pgd", "eps": eps, "steps": 50},
        {"name": "adv2", "eps": eps, "steps": 100, "knowledge": "adaptive"},
        {"name": "map-pgd", "eps": eps, "aim": "move", "knowledge": "adaptive"},
    ]
    return check({
        "name": f"honest-{data}-{seed}",
        "seed": seed,
        "data": digits if data == "digits" else fashion,
        "model": {"name": "small-cnn", "train": {"epochs": 8 if data == "digits" else 3, "batch_size": 64, "lr": 1e-2}},
        "interpreters": ["gradient", "cam", "gradcam"],
        "defenses": [
            {"name": "beta-smoothing", "of": "gradient", "beta": 3},
            {"name": "aggregated", "of": "gradcam", "members": ["gradient", "gradcam"]},
        ],
        "attacks": [*attacks, *([{"name": "auto", "eps": eps, "knowledge": "adaptive"}] if auto else [])],
        "evaluation": {"images": images, "batch_size": images},
        "audit": {"level": "full" if full else "cheap"},
    })  # fmt: skip


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


def checked(root: Path, out: Path, found: Sequence[Raised]) -> list[Raised]:
    """The same flags, with what they say of other inputs."""
    if not found:
        return []
    results, folder = Results.read(RunFolder(root)), RunFolder(root)
    recipe = results.experiment
    assert isinstance(recipe, Recipe)
    data, judged = check_data(recipe), seals.read_or_none(root / JUDGED, "positions", "beyond")
    assert judged is not None
    left = sorted(set(range(len(data.test))) - {int(p) for p in (*judged["positions"], *judged["beyond"])})
    others = replace(data, test=data_sets.subset(data.test, left), digest=f"{data.digest} others")
    asked = {flag.row for flag in found}
    rows = [
        r for r in recipe.rows if r.label in asked or any(o.root == r.label for o in recipe.rows if o.label in asked)
    ]
    systems: dict[str, Any] = {}
    for row in rows:
        system = System.load(folder.system(row.label))
        systems[row.label] = (system, row.root) if row.derived else system
    columns = {flag.column for flag in found}
    attacks = {
        c.label: c.attack if c.facts.control else (c.attack, c.knowledge)
        for c in recipe.columns
        if isinstance(c.attack, Attack) and (c.facts.control or c.label in columns)
    }
    images = OTHERS * recipe.evaluation.images
    settings = replace(recipe.evaluation, images=images, batch_size=images)
    audit = replace(recipe.audit, images=OTHERS * recipe.audit.images)
    again = evaluate(systems, attacks, others, out=out, evaluation=settings, audit=audit, seed=recipe.seed + 1)
    known = {(f.row, f.column, f.name): f.reason for f in flagged("", again)}
    return [replace(f, again=known.get((f.row, f.column, f.name))) for f in found]


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
    """Make the runs, check their flags, print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--full", type=int, default=1)
    parser.add_argument("--auto", type=int, default=1)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--fashion")
    parser.add_argument("--data", nargs="*", default=list(EPS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells, found = 0, []
    for seed in range(given.seeds):
        for data in given.data:
            asked = recipe(
                data, seed, full=seed < given.full, auto=seed < given.auto, root=given.fashion, images=given.images
            )
            folder = RunFolder(given.out / asked.name)
            run(asked, folder.root, Session())
            results = Results.read(folder)
            flags = flagged(asked.name, results)
            cells += len(list(honest(results)))
            found += checked(folder.root, given.out / f"{asked.name}-again", flags)
            print(f"{asked.name}: {len(flags)} flags", flush=True)
    print(as_markdown(cells, found))


if __name__ == "__main__":
    main()
