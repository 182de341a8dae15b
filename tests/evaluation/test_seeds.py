"""Everything trained again under other seeds: one run directory, intervals over seeds and samples, each seed shown."""

from __future__ import annotations

import csv
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robustexplain.errors import InputError, RobustExplainWarning
from robustexplain.evaluation import Results, RunFolder, flags, run
from robustexplain.evaluation.matrix import sum_up
from robustexplain.evaluation.report import write_report
from robustexplain.evaluation.row_flags import flag
from robustexplain.evaluation.seeds import again, stacked
from robustexplain.evaluation.statistics import over_seeds, share, shares_over_seeds
from robustexplain.evaluation.worst import WORST
from robustexplain.random_streams import derive
from robustexplain.recipe import check, read
from robustexplain.recipe.experiment import Recipe

TINY = Path(__file__).parents[1] / "tiny.yaml"
SMALL = [
    "model.train.epochs=2",
    "interpreters=[gradient]",
    "defenses=[{name: beta-smoothing, of: gradient}]",
    "attacks=[clean, {name: pgd, eps: 0.2, steps: 4}, {name: ghorbani-topk, eps: 0.1, steps: 4}]",
    "evaluation.calibration=20",
    "evaluation.harmless=[uniform-noise]",
]


def recipe(seeds: int) -> Recipe:
    return read(TINY, [*SMALL, f"seeds={seeds}"])


def quiet(made: Recipe, root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        assert run(made, root) == 0


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, tuple[bytes, int]]]:
    """A run of one seed that grew to three, and what its first arrays were."""
    root = tmp_path_factory.mktemp("runs") / "seeds"
    quiet(recipe(1), root)
    cells = sorted((root / "cells").glob("*.safetensors"))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in cells}
    one = Results.read(RunFolder(root))
    assert one.seeds == 1
    alone = one.measure("gradient", "pgd", "success")
    assert alone is not None
    assert "each" not in alone
    quiet(recipe(3), root)
    return RunFolder(root), before


def test_what_is_in_doubt_under_one_seed_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, weak = flag("zero-gradient", "masked"), flag("few-steps", "3 steps")
    folder: Any = SimpleNamespace(done=lambda row, column: {"flags": [masked, weak]})
    monkeypatch.setattr(flags, "repeats", lambda experiment, first: [first, folder, folder])
    nothing: Any = SimpleNamespace(label="")
    found = list(flags._of_repeats(nothing, folder, nothing, nothing, {"few-steps"}))
    assert found == [flag("zero-gradient", "in training 2: masked")]


def test_more_seeds_keep_the_first_and_train_everything_again(
    grown: tuple[RunFolder, dict[str, tuple[bytes, int]]],
) -> None:
    folder, before = grown
    for name, known in before.items():
        path = folder.root / "cells" / name
        assert (path.read_bytes(), path.stat().st_mtime_ns) == known
    weights = [(f.root / "weights.json").read_text() for f in (folder, folder.repeat(1), folder.repeat(2))]
    assert len(set(weights)) == 3
    # The same inputs and goals where both classifiers are right.
    a, b = (f.arrays("gradient", "pgd") for f in (folder, folder.repeat(1)))
    goals = [dict(zip(x["sample"].tolist(), x["goal_class"].tolist(), strict=True)) for x in (a, b)]
    both = goals[0].keys() & goals[1].keys()
    assert len(both) > 4
    assert all(goals[0][sample] == goals[1][sample] for sample in both)


def test_cells_hold_an_interval_over_seeds_and_samples_and_each_seed_s_value(
    grown: tuple[RunFolder, dict[str, tuple[bytes, int]]],
) -> None:
    folder, _ = grown
    results, resamples, seed = Results.read(folder), 200, derive(0, "statistics")
    assert results.seeds == 3
    several = [folder.repeat(i).arrays("gradient", "pgd") for i in range(3)]
    for name, estimate in (("confidence", over_seeds), ("success", shares_over_seeds)):
        found = results.measure("gradient", "pgd", name)
        assert found is not None
        expected = estimate(stacked(several, name), resamples, seed).as_dict()
        assert {k: found[k] for k in expected} == expected
        assert found["each"] == pytest.approx([float(a[name].mean()) for a in several])
    separation = results.measure("gradient", "pgd", "separation")
    singles = [f.read_cell("gradient", "pgd")["measures"]["separation"] for f in map(folder.repeat, range(3))]  # type: ignore[index]
    assert separation is not None
    assert separation["value"] == pytest.approx(sum(e["value"] for e in singles) / 3)
    assert separation["high"] - separation["low"] >= min(e["high"] - e["low"] for e in singles) * 0.8
    against = results.against("beta-smoothing (gradient)", "pgd", "success")
    assert against is not None
    assert (against["value"], against["p"]) == (0, 1)  # the same classifier under the same attack


def test_a_finished_run_of_seeds_is_not_made_again_and_fewer_seeds_say_less(
    grown: tuple[RunFolder, dict[str, tuple[bytes, int]]],
) -> None:
    folder, _ = grown
    paths = [p for f in map(folder.repeat, range(3)) for p in (f.root / "cells").iterdir()]
    before = {path: path.stat().st_mtime_ns for path in paths}
    folder.repeat(2).cell("gradient", "pgd").unlink()
    quiet(recipe(3), folder.root)
    lost = {folder.repeat(2).cell("gradient", "pgd").with_suffix(s) for s in (".json", ".safetensors")}
    rewritten = {path for path in paths if path.stat().st_mtime_ns != before[path]}
    assert lost <= rewritten
    assert all(folder.repeat(2).root in path.parents for path in rewritten)
    assert not any(path.suffix == ".safetensors" and path not in lost for path in rewritten)


def test_figures_of_one_training_name_it(grown: tuple[RunFolder, dict[str, tuple[bytes, int]]], tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(grown[0].root, root)
    folder = RunFolder(root)
    shares = [folder.repeat(i).done("gradient", "pgd")["measures"]["confidence"]["value"] for i in range(3)]  # type: ignore[index]
    folder.repeat(1).cell("gradient", "pgd").unlink()
    sum_up(recipe(3), folder)
    write_report(folder)
    with (root / "matrix.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if (line["row"], line["column"]) == ("gradient", "pgd")]
    found = {line["measure"]: float(line["value"] or "nan") for line in lines}
    assert found["confidence seed 1"] == pytest.approx(shares[0])
    assert found["confidence seed 3"] == pytest.approx(shares[2])
    assert "confidence seed 2" not in found
    # Of the first training alone.
    assert {"l1_on_successes seed 1"} <= found.keys()
    assert "l1_on_successes" not in found
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "limits and alarms of the first of 3 trainings" in page


def test_the_worst_case_counts_a_sample_that_any_attacker_won(
    grown: tuple[RunFolder, dict[str, tuple[bytes, int]]],
) -> None:
    folder, _ = grown
    results = Results.read(folder)
    for row in ("gradient", "beta-smoothing (gradient)"):
        known, each = results.worst[row], []
        for f in map(folder.repeat, range(3)):
            pgd, moved = (f.arrays(row, column)["joint_correct"] for column in ("pgd", "ghorbani-topk"))
            each.append(float(torch.maximum(pgd, moved).mean()))
        assert known.each == pytest.approx(each)
        assert known.missing == ()
    against = results.worst["beta-smoothing (gradient)"].against["worst"]
    assert {"value", "low", "high", "p"} <= against.keys()
    with (folder.root / "matrix.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["column"] == WORST]
    compared = {"worst_forge_minus_root", "worst_move_minus_root"}
    assert {"worst", "worst_forge", "worst_move", "worst seed 3", *compared} <= {x["measure"] for x in lines}


def test_a_worst_case_that_is_not_written_or_of_other_cells_is_computed_by_the_same_code(
    grown: tuple[RunFolder, dict[str, tuple[bytes, int]]], tmp_path: Path
) -> None:
    folder = RunFolder(Path(shutil.copytree(grown[0].root, tmp_path / "run")))
    written = Results.read(folder).worst
    for path in folder.worst("gradient").parent.iterdir():
        path.unlink()
    computed = Results.read(folder).worst
    assert computed.keys() == written.keys()
    for row, known in written.items():
        same = computed[row]
        assert (same.measures, same.against, same.missing) == (known.measures, known.against, known.missing)
        assert same.several.keys() == known.several.keys() == {0, 1, 2}
        torch.testing.assert_close(same.several, known.several, equal_nan=True)
    # A cell of another seed that is damaged is left out, and said to be.
    arrays = folder.repeat(1).cell("gradient", "pgd").with_suffix(".safetensors")
    arrays.write_bytes(arrays.read_bytes()[:-9])
    assert Results.read(folder).worst["gradient"].missing == ("pgd",)


def test_repeats_differ_in_the_seeds_of_what_is_trained_alone() -> None:
    plain = read(TINY, ["seeds=3"])
    other = again(plain, 2)
    assert (other.seed, other.evaluation, other.seeds, other.repeat) == (plain.seed, plain.evaluation, 1, 2)
    assert other.training_seed != plain.training_seed == plain.seed
    trained = [row.label for row in plain.rows if row.kind == "defense"]
    assert len({r.row(label).settings.seed for r in (plain, other, again(plain, 1)) for label in trained[:1]}) == 3
    assert check(other.source).row(trained[0]).settings == other.row(trained[0]).settings
    with pytest.raises(InputError, match="seeds: 3 trainings are those of repeat 0 to 2, and repeat: 1 names one"):
        read(TINY, ["seeds=3", "repeat=1"])
    with pytest.raises(InputError, match="seeds: a whole number from 1 to 1000 is needed, got 0"):
        read(TINY, ["seeds=0"])


def test_shares_that_agree_under_all_seeds_have_no_point_for_an_interval() -> None:
    none = shares_over_seeds(torch.zeros(3, 8))
    assert (none.low, none.high) == (0, share(torch.zeros(8)).high)
    mixed = torch.cat([torch.zeros(3, 4), torch.ones(3, 4)], 1)
    found, plain = shares_over_seeds(mixed), share(mixed[0])
    assert found.low is not None and plain.low is not None and found.low <= plain.low  # noqa: PT018
