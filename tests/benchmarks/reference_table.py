"""The reference table: what a fixed IoU says of the quickstart's rows, and what calibrated plausibility says.

Run it as ``python tests/benchmarks/reference_table.py RUN OUT``: ``RUN`` is a finished run of the quickstart, whose
trained parts are reused, and ``OUT`` a folder for three runs, one for each of the reference's harmless changes (uniform
noise of 1/32, of 1/16, JPEG of quality 75), of ADV2 by an adaptive adversary alone.

What must hold: the old figures and the product's agree within the 95% intervals of 100 inputs: the interval of their
difference contains 0. The reference's inputs, code and training were others, so each side has its own interval.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats  # type: ignore[import-untyped]
import torch

from robustexplain.evaluation import RunFolder, run
from robustexplain.evaluation.results import Results
from robustexplain.recipe import read
from robustexplain.training import Session

HARMLESS = {
    "noise 1/32": "[{name: uniform-noise, eps: 1/32}]",
    "noise 1/16": "[{name: uniform-noise, eps: 1/16}]",
    "JPEG 75": "[{name: jpeg, quality: 75}]",
}
ATTACKS = "[{name: adv2, eps: 0.125, steps: 50, knowledge: adaptive}]"
INPUTS = 100


@dataclass(frozen=True)
class Reference:
    """What the reference measured of a row on 100 inputs, before the product did.

    Args:
        l1: mean distance of attacked maps.
        iou: joint success by an IoU above 0.5.
        joint: joint success by each harmless change's 95% quantile, in the order of ``HARMLESS``.
        auc: attacked against noise of 1/32.
    """

    l1: float
    iou: float
    joint: tuple[float, float, float]
    auc: float


REFERENCE = {
    "gradient": Reference(0.053, 0.13, (0.81, 0.99, 0.52), 0.68),
    "beta-smoothing (gradient)": Reference(0.046, 0.19, (0.26, 0.89, 0.08), 0.95),
    "aggregated (gradcam)": Reference(0.053, 0.14, (0.71, 0.98, 0.43), 0.81),
    "cam": Reference(0.022, 1.00, (0.97, 1.00, 0.98), 0.30),
    "rts": Reference(0.072, 0.82, (0.76, 0.82, 0.72), 0.47),
    "aid (rts)": Reference(0.139, 0.82, (0.76, 0.83, 0.53), 0.43),
    "x-ensemble (gradcam)": Reference(0.022, 0.76, (0.71, 0.75, 0.71), 0.34),
}


def differs(old: float, new: float, n: int = INPUTS, m: int = INPUTS) -> bool:
    """Whether two shares of so many inputs differ beyond chance: Fisher's exact test at 5%."""
    hits, others = round(old * n), round(new * m)
    return bool(scipy.stats.fisher_exact([[hits, n - hits], [others, m - others]])[1] < 0.05)


def far(old: float, low: float, high: float, new: float) -> bool:
    """Whether two means differ beyond chance, the old one's interval being taken as wide as the new one's."""
    return abs(old - new) > math.sqrt(2) * (high - low) / 2


def made(quickstart: Path, out: Path, recipe: str) -> dict[str, Results]:
    """A run for each harmless change, by its words."""
    runs = {}
    for words, harmless in HARMLESS.items():
        asked = [f"evaluation.harmless={harmless}", f"attacks={ATTACKS}"]
        folder = RunFolder(out / words.replace(" ", "-").replace("/", "-"))
        run(
            read(recipe, asked),
            folder.root,
            Session(reuse=(quickstart, *(out / "reused",) * (out / "reused").is_dir())),
        )
        runs[words] = Results.read(folder)
    return runs


def value(estimate: Any) -> str:
    """An estimate in words."""
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def as_markdown(runs: dict[str, Results]) -> str:
    """Old and new, a line a row and measure; the last column says where they differ beyond chance."""
    text = ["| row | measure | old | new | differs |", "| --- | --- | --- | --- | --- |"]
    first = next(iter(runs.values()))
    column = first.experiment.columns[0].label
    for row, old in REFERENCE.items():
        cells = {words: results.cells[row, column] for words, results in runs.items()}
        done = {words: cell["measures"] for words, cell in cells.items() if cell is not None}
        plain = done["noise 1/32"]
        l1, auc = plain["l1"], plain["separation"]
        entries = [("L1", f"{old.l1:.3f}", f"{l1['value']:.3f} [{l1['low']:.3f}, {l1['high']:.3f}]",
                    far(old.l1, l1["low"], l1["high"], l1["value"]))]  # fmt: skip
        entries.append(
            ("joint, IoU", f"{old.iou:.2f}", value(plain["joint_iou"]), differs(old.iou, plain["joint_iou"]["value"]))
        )
        for words, was in zip(HARMLESS, old.joint, strict=True):
            now = done[words]["joint"]
            entries.append((f"joint, {words}", f"{was:.2f}", value(now), differs(was, now["value"])))
        entries.append(("AUC", f"{old.auc:.2f}", value(auc), far(old.auc, auc["low"], auc["high"], auc["value"])))
        text += [f"| {row} | {name} | {was} | {now} | {'yes' if wrong else ''} |" for name, was, now, wrong in entries]
    return "\n".join(text)


def main() -> None:
    """Make the runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(as_markdown(made(given.quickstart, given.out, given.recipe)))


if __name__ == "__main__":
    main()
