"""Whether calibration holds on inputs that no run has used: limits of plausible maps, and false alarms.

Run it as ``python tests/benchmarks/calibration_holds.py RUN [RUN ...] [--draws 1000] [--inputs 2000]`` on finished
runs of recipes. Fresh inputs are those of the test part that are neither judged nor calibrated on, chosen alike; of
rows that nothing was trained for on the defense part, that part's too. Each is changed again until there are
``--draws`` of each kind. A second table shows how much of a cell's joint success is the luck of the calibration.

What must hold: the share of fresh harmless draws beyond a kind's own quantile lies in its 95% prediction interval, and
beyond the row's limit (the largest of the quantiles) not above it; so do alarms. The interval knows that the quantile
is an estimate itself: with rank ``l`` among ``n`` values, the chance that another one is beyond it is
``Beta(n + 1 - l, l)``, and hits among ``m`` fresh inputs are beta-binomial. Several draws of one input are not
independent: all draws give the share, and its interval is that of as many draws as inputs, which is too wide rather
than too narrow. One row in twenty is outside by chance. Over runs, the mean share must be ``1 - l / (n + 1)``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats  # type: ignore[import-untyped]
import torch
from torch import Tensor

from robustexplain import data as data_sets
from robustexplain import seals
from robustexplain.data import Data, Samples
from robustexplain.door import answer
from robustexplain.evaluation import RunFolder
from robustexplain.evaluation.calibration import Calibrator, Draws, conformal_quantile
from robustexplain.evaluation.identity import JUDGED
from robustexplain.evaluation.results import Results
from robustexplain.evaluation.statistics import share
from robustexplain.random_streams import derive
from robustexplain.recipe import check_data
from robustexplain.recipe.experiment import Recipe, Row
from robustexplain.system import System
from robustexplain.transforms import harmless_for

Ends = tuple[float, float]
WHAT = ("own quantile", "row's limit", "alarms")
KNOWN = (100, 200, 500, 1000)


@dataclass(frozen=True)
class Promise:
    """What a split-conformal quantile promises of other inputs from the same source.

    Args:
        known: how many values it was taken from.
        quantile: which.
    """

    known: int
    quantile: float

    @property
    def above(self) -> int:
        """How many of the ranks 1 to ``known + 1`` are above the quantile's."""
        return self.known + 1 - math.ceil((self.known + 1) * self.quantile - 1e-9)

    @property
    def expected(self) -> float:
        """The share beyond it, over all calibrations."""
        return self.above / (self.known + 1)

    def one(self) -> Ends:
        """Where 95% of calibrations have their share of infinitely many inputs."""
        low, high = scipy.stats.beta.ppf([0.025, 0.975], self.above, self.known + 1 - self.above)
        return float(low), float(high)

    def of(self, inputs: int) -> Ends:
        """Where 95% of calibrations have their share of so many fresh inputs."""
        ends = scipy.stats.betabinom.ppf([0.025, 0.975], inputs, self.above, self.known + 1 - self.above)
        return float(ends[0]) / inputs, float(ends[1]) / inputs

    def plain(self, inputs: int) -> Ends:
        """The same if the quantile were exact."""
        low, high = scipy.stats.binom.ppf([0.025, 0.975], inputs, 1 - self.quantile)
        return float(low) / inputs, float(high) / inputs


@dataclass(frozen=True)
class Line:
    """What was found of one row and one kind of change; ``clean`` is one for alarms.

    Args:
        row: its label.
        what: ``own quantile``, ``row's limit`` or ``alarms``.
        kind: of harmless change.
        inputs: independent ones.
        draws: of them, that kept the prediction.
        value: the share beyond.
        promise: what was promised.
    """

    row: str
    what: str
    kind: str
    inputs: int
    draws: int
    value: float
    promise: Promise

    def held(self, ends: Ends) -> bool:
        """Whether the share is where it must be; only a kind's own quantile promises not too few."""
        return self.value <= ends[1] and (self.what != "own quantile" or self.value >= ends[0])


def beyond(found: dict[str, Tensor], kind: int, limit: float) -> tuple[float, int, int]:
    """The share of a kind's draws beyond a limit, how many inputs they are of and how many draws counted."""
    of_kind = (found["change"] == kind) & (found["kept"] > 0)
    far = (found["distance"][of_kind] > limit).float()
    return float(far.mean()), len(found["sample"][of_kind].unique()), len(far)


def lines(row: str, known: dict[str, Any], arrays: dict[str, Tensor], fresh: dict[str, Tensor]) -> Iterator[Line]:
    """What is found of a row: its calibration's JSON and arrays, and the same of fresh inputs."""
    for kind, entry in enumerate(known["harmless"]):
        used = int(((arrays["change"] == kind) & (arrays["kept"] > 0)).sum())
        for what, limit in (("own quantile", known["limit_by"][kind]), ("row's limit", known["limit"])):
            value, inputs, draws = beyond(fresh, kind, limit)
            yield Line(row, what, entry["name"], inputs, draws, value, Promise(used, known["quantile"]))


def alarms(row: str, system: System, kinds: Sequence[str], fresh: dict[str, Tensor]) -> Iterator[Line]:
    """What is found of a row's alarms on clean inputs and on those of each kind of change."""
    scores = getattr(system.detector, "scores", None)
    if "alarm" not in fresh or scores is None:
        return
    promise, first = Promise(len(scores), 0.95), (fresh["draw"] == 0) & (fresh["change"] == 0)
    known = [("clean", fresh["clean_alarm"][first], first)]
    for kind, name in enumerate(kinds):
        of_kind = fresh["change"] == kind
        known.append((name, fresh["alarm"][of_kind], of_kind))
    for name, rings, which in known:
        inputs = len(fresh["sample"][which].unique())
        yield Line(row, "alarms", name, inputs, len(rings), float(rings.mean()), promise)


@torch.no_grad()
def right(system: System, samples: Samples, positions: Sequence[int], only: bool) -> list[int]:
    """Those positions that the classifier gets right, or all."""
    if not only:
        return list(positions)
    found: list[int] = []
    for start in range(0, len(positions), 256):
        some = positions[start : start + 256]
        x, y = data_sets.stack(samples, some)
        found += [p for p, ok in zip(some, (answer(system.model, x).argmax(1) == y).tolist(), strict=True) if ok]
    return found


def trained_on_defense(recipe: Recipe, row: Row) -> bool:
    """Whether the row, or one below it, was trained or calibrated on the defense part."""
    by_label = {other.label: other for other in recipe.rows}
    while row.derived:
        if row.settings.needs_data:
            return True
        row = by_label[row.base]
    return False


def fresh_inputs(
    recipe: Recipe, row: Row, root: System, data: Data, used: set[int], most: int
) -> tuple[Tensor, Tensor]:
    """Inputs that nothing of a row has seen, in random order, at most so many: their numbers and themselves."""
    only = recipe.evaluation.only_correct
    order = [int(p) for p in data_sets.take(data.test, len(data.test), recipe.seed).indices]  # type: ignore[attr-defined]
    parts: list[tuple[Samples, list[int], int]] = [(data.test, [p for p in order if p not in used], 0)]
    if not trained_on_defense(recipe, row):
        parts.append((data.defense, list(range(len(data.defense))), len(data.test)))
    numbers: list[int] = []
    x: list[Tensor] = []
    for samples, positions, offset in parts:
        left = most - len(numbers)
        good = right(root, samples, positions[: 2 * left], only)[:left]
        if good:
            numbers += [offset + p for p in good]
            x.append(data_sets.stack(samples, good)[0])
    return torch.tensor(numbers), torch.cat(x)


def measured(calibrator: Calibrator, system: System, numbers: Tensor, x: Tensor, draws: int) -> dict[str, Tensor]:
    """What the calibration would have measured on other inputs, each ``draws`` times."""
    parts = []
    for turn in range(draws):
        for start in range(0, len(x), 64):
            some = slice(start, start + 64)
            turns = torch.full((len(x[some]),), turn)
            parts.append(calibrator.measure(system, Draws(0, x[some], numbers[some], turns)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def joint_at(arrays: dict[str, Tensor], limit: float, moves: bool) -> float:
    """A cell's joint success if its row's limit were another one."""
    won = (arrays["success"] > 0) & ((arrays["distance"] <= limit) ^ moves)
    if "alarm" in arrays:
        won &= arrays["alarm"] == 0
    return float(won.float().mean())


def limits_of_others(distances: Tensor, known: int, quantile: float, times: int = 400) -> list[float]:
    """The limits of a row that other calibrations would have given, each of ``known`` inputs drawn anew.

    Args:
        distances: ``[K, N]``, of every kind and input; NaN where the prediction changed.
        known: how many inputs a calibration has.
        quantile: which.
        times: how many calibrations.
    """
    random, limits = torch.Generator().manual_seed(0), []
    for _ in range(times):
        some = distances[:, torch.randint(distances.shape[1], (known,), generator=random)]
        limits.append(max(conformal_quantile(kind[~kind.isnan()], quantile) for kind in some))
    return limits


def first_draws(arrays: dict[str, Tensor]) -> Tensor:
    """``[K, N]``: the distance of every kind's first draw of every input; NaN where the prediction changed."""
    kinds = []
    for kind in arrays["change"].unique().tolist():
        first = (arrays["change"] == kind) & (arrays["draw"] == 0)
        kept = torch.where(arrays["kept"][first] > 0, arrays["distance"][first], torch.nan)
        kinds.append(kept[arrays["sample"][first].argsort()])
    return torch.stack(kinds)


def luck(run: Results, folder: RunFolder, row: Row, distances: Tensor) -> Iterator[str]:
    """How much of a cell's joint success is the luck of its row's calibration, by how many inputs that has."""
    for column in run.experiment.columns:
        if column.facts.control or not column.facts.needs_maps or folder.done(row.label, column.label) is None:
            continue
        arrays, cells = folder.arrays(row.label, column.label), []
        for known in KNOWN[:3]:
            limits = limits_of_others(distances, known, run.experiment.evaluation.plausible.quantile)
            values = torch.tensor([joint_at(arrays, limit, column.facts.keeps_prediction) for limit in limits])
            low, middle, high = values.quantile(torch.tensor([0.025, 0.5, 0.975])).tolist()
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        here = float(arrays["joint"].mean())
        yield f"| {row.label} / {column.label} | {here:.2f} | {distances.shape[1]} | {' | '.join(cells)} |"


def of_run(root: Path, least: int, most: int) -> tuple[list[Line], list[str]]:
    """What is found of every row of a run: its lines, and how its cells depend on the luck of calibration."""
    folder = RunFolder(root)
    run = Results.read(folder)
    recipe = run.experiment
    assert isinstance(recipe, Recipe)
    data = check_data(recipe)
    judged = seals.read_or_none(root / JUDGED, "positions", "beyond")
    assert judged is not None
    used = {int(p) for p in (*judged["positions"], *judged["beyond"])}
    found: list[Line] = []
    chances: list[str] = []
    for row in recipe.rows:
        known, arrays = folder.calibrated(row.label) or (None, None)
        if known is None or arrays is None or known["part"] != "test":
            print(f"{row.label} is left out: not calibrated on the test part")
            continue
        system, below = System.load(folder.system(row.label)), System.load(folder.system(row.root))
        numbers, x = fresh_inputs(recipe, row, below, data, used, most)
        changes = harmless_for(recipe.evaluation.harmless, data.shape, x)
        metric = recipe.evaluation.plausible.metric
        calibrator = Calibrator("test", (), changes, metric, derive(recipe.seed, "fresh", row.label))
        fresh = measured(calibrator, system, numbers, x, math.ceil(least / len(x)))
        found += [*lines(row.label, known, arrays, fresh)]
        found += alarms(row.label, system, [entry["name"] for entry in known["harmless"]], fresh)
        both = torch.cat([first_draws(arrays), first_draws(fresh)], 1)
        chances += luck(run, folder, row, both)
    return found, chances


def as_markdown(found: Sequence[Line]) -> str:
    """A table, and how many lines hold by either reading."""
    head = "| row | beyond | change | inputs | draws | share | exact interval | plain | corrected | holds |"
    text = [head, "|" + " --- |" * 10]
    for line in found:
        exact = share((torch.arange(line.inputs) < round(line.value * line.inputs)).float())
        plain, corrected = line.promise.plain(line.inputs), line.promise.of(line.inputs)
        verdict = ("yes" if line.held(plain) else "no") + ", " + ("yes" if line.held(corrected) else "no")
        ends = f"[{exact.low:.3f}, {exact.high:.3f}]"
        text.append(
            f"| {line.row} | {line.what} | {line.kind} | {line.inputs} | {line.draws} | {line.value:.3f} | {ends} | "
            f"[{plain[0]:.3f}, {plain[1]:.3f}] | [{corrected[0]:.3f}, {corrected[1]:.3f}] | {verdict} |"
        )
    return "\n".join(text)


def over_runs(found: Sequence[Sequence[Line]]) -> str:
    """Of several runs: the mean share beyond each kind's own quantile, with Student's interval, beside the promise."""
    each = {what: [[li for li in run if li.what == what] for run in found] for what in WHAT}
    text = ["| beyond | shares | mean | interval over runs | promised | outside plain | outside corrected |"]
    text.append("|" + " --- |" * 7)
    for what, runs in each.items():
        runs = [run for run in runs if run]
        if not runs:
            continue
        flat = [line for run in runs for line in run]
        means = torch.tensor([sum(li.value for li in run) / len(run) for run in runs], dtype=torch.float64)
        half = math.nan
        if len(runs) > 1:
            half = float(scipy.stats.t.ppf(0.975, len(runs) - 1) * means.std() / len(runs) ** 0.5)
        mean, expected = float(means.mean()), sum(li.promise.expected for li in flat) / len(flat)
        plain = sum(not li.held(li.promise.plain(li.inputs)) for li in flat)
        corrected = sum(not li.held(li.promise.of(li.inputs)) for li in flat)
        most = "" if what == "own quantile" else "at most "
        text.append(
            f"| {what} | {len(flat)} | {mean:.4f} | [{mean - half:.4f}, {mean + half:.4f}] | {most}{expected:.4f} | "
            f"{plain} | {corrected} |"
        )
    return "\n".join(text)


def promises(quantile: float = 0.95) -> str:
    """What so many calibration inputs promise."""
    rows = [
        f"| {n} | {(p := Promise(n, quantile)).expected:.4f} | [{p.one()[0]:.3f}, {p.one()[1]:.3f}] |" for n in KNOWN
    ]
    return "\n".join(["| inputs | share beyond, on average | of 95% of calibrations |", "| --- | --- | --- |", *rows])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--inputs", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [of_run(root, given.draws, given.inputs) for root in given.runs]
    head = "| cell | joint | pool | " + " | ".join(f"{n} inputs" for n in KNOWN[:3]) + " |\n|" + " --- |" * 6
    for root, (of_one, chances) in zip(given.runs, found, strict=True):
        print("\n".join(["", str(root), "", as_markdown(of_one), "", head, *chances]))
    print(f"\n{over_runs([of_one for of_one, _ in found])}\n\n{promises()}")


if __name__ == "__main__":
    main()
