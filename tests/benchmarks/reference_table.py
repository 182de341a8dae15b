"""The reference table: what a fixed IoU says of the quickstart's rows, and what calibrated plausibility says.

Run it as ``python tests/benchmarks/reference_table.py RUN OUT``: ``RUN`` is a finished run of the quickstart, whose
trained parts are reused, and ``OUT`` a folder for three runs, one for each of the reference's harmless changes (uniform
noise of 1/32, of 1/16, JPEG of quality 75), of ADV2 by an adaptive adversary alone.

What must hold: old figures and the product's agree within 95% intervals. Shares of 100 inputs are compared by Fisher's
exact test: inputs, code and training of the reference were others. Joint success by a limit also has the limit's own
luck: it differs where the old share is outside the range from the exact interval's lower end at the lower end of the
limit's 95% range to its upper end at the upper one, too.
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
from robustexplain.evaluation.calibration import quantile_range
from robustexplain.evaluation.results import Results
from robustexplain.evaluation.statistics import share
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


@dataclass(frozen=True)
class Made:
    """A run with one harmless change.

    Args:
        folder: its directory.
        results: what it holds.
    """

    folder: RunFolder
    results: Results

    @property
    def column(self) -> str:
        """The label of its only attack."""
        return self.results.experiment.columns[0].label

    def measures(self, row: str) -> dict[str, Any]:
        """The measures of a row's cell."""
        cell = self.results.cells[row, self.column]
        assert cell is not None
        found: dict[str, Any] = cell["measures"]
        return found

    def joint_range(self, row: str) -> tuple[float, float]:
        """Between what joint success may lie, by the luck of inputs and of the row's limit."""
        arrays, (known, calibration) = self.folder.arrays(row, self.column), self.folder.calibrated(row) or ({}, {})
        ends = quantile_range(calibration["distance"][calibration["kept"] > 0], known["quantile"])
        won = (arrays["success"] > 0) & (arrays["alarm"] == 0 if "alarm" in arrays else True)
        low, high = (share((won & (arrays["distance"] <= end)).float()) for end in ends)
        assert low.low is not None
        assert high.high is not None
        return low.low, high.high


def made(quickstart: Path, out: Path, recipe: str) -> dict[str, Made]:
    """A run for each harmless change, by its words."""
    runs: dict[str, Made] = {}
    for words, harmless in HARMLESS.items():
        asked = [f"evaluation.harmless={harmless}", f"attacks={ATTACKS}"]
        folder = RunFolder(out / words.replace(" ", "-").replace("/", "-"))
        run(read(recipe, asked), folder.root, Session(reuse=(quickstart, *(m.folder.root for m in runs.values()))))
        runs[words] = Made(folder, Results.read(folder))
    return runs


def as_markdown(runs: dict[str, Made]) -> str:
    """Old and new, a line a row and measure; the last column says where they differ beyond chance."""
    text = ["| row | measure | old | new | 95% | differs |", "|" + " --- |" * 6]
    for row, old in REFERENCE.items():
        plain = runs["noise 1/32"].measures(row)
        for name, was, now in (("L1", old.l1, plain["l1"]), ("AUC", old.auc, plain["separation"])):
            wrong = far(was, now["low"], now["high"], now["value"])
            text.append(line(row, name, was, now["value"], (now["low"], now["high"]), wrong))
        iou = plain["joint_iou"]
        text.append(
            line(row, "joint, IoU", old.iou, iou["value"], (iou["low"], iou["high"]), differs(old.iou, iou["value"]))
        )
        for words, was in zip(HARMLESS, old.joint, strict=True):
            low, high = runs[words].joint_range(row)
            now = runs[words].measures(row)["joint"]["value"]
            wrong = differs(was, now) and not low <= was <= high
            text.append(line(row, f"joint, {words}", was, now, (low, high), wrong))
    return "\n".join(text)


def line(row: str, name: str, old: float, new: float, ends: tuple[float, float], wrong: bool) -> str:
    """A line of the table."""
    told = f"{new:.3f}" if name == "L1" else f"{new:.2f}"
    return f"| {row} | {name} | {old} | {told} | [{ends[0]:.3f}, {ends[1]:.3f}] | {'yes' if wrong else ''} |"


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
