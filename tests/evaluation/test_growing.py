"""A run directory grows: what still holds is kept to the byte, what changed is made anew, and nothing else is."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import attacks, files, interpreters, training
from robustexplain.errors import InputError, RobustExplainWarning, RunMismatchError
from robustexplain.evaluation import Evaluation, Results, RunFolder, growing, matrix, run
from robustexplain.evaluation.origins import Origins
from robustexplain.models import build
from robustexplain.progress import Silent
from robustexplain.recipe import read
from robustexplain.recipe.experiment import Recipe
from robustexplain.training import Session

TINY = Path(__file__).parents[1] / "tiny.yaml"
RTS = "{name: rts, levels: 2, width: 4, training: {epochs: 1, micro_batch: 32}}"
PGD = "{name: pgd, eps: 0.2, steps: 2, step_size: 0.1}"
ADV2 = "{name: adv2, eps: 0.2, steps: 2, step_size: 0.1}"
NOISE = "{name: noise, eps: 0.2, kind: sign}"
SMALL = {
    "interpreters": f"[cam, {RTS}]",
    "defenses": "[]",
    "attacks": f"[clean, {PGD}]",
    "model.train.epochs": "1",
    "evaluation.bootstrap": "50",
    "metrics": "[l1, l2]",
    "evaluation.images": "8",
    "evaluation.batch_size": "4",
}


def recipe_of(**changes: str) -> Recipe:
    given = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    return read(TINY, [f"{key}={value}" for key, value in given.items()])


class Heard(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def grow(recipe: Recipe, root: Path) -> str:
    """Run the recipe in the directory; what was said."""
    heard = Heard()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        assert run(recipe, root, Session(progress=heard)) == 0
    return "\n".join(heard.lines)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe, finished; tests copy it."""
    root = tmp_path_factory.mktemp("first") / "run"
    grow(recipe_of(), root)
    return root


@pytest.fixture
def root(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "run"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Epochs that are trained from here on, by name."""
    counted: Counter[str] = Counter()
    real = training.loop._Loop.epoch

    def epoch(loop: Any, *rest: Any) -> float:
        counted[loop.task.name] += 1
        return real(loop, *rest)

    monkeypatch.setattr(training.loop._Loop, "epoch", epoch)
    return counted


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Chunks that are attacked from here on, by attack."""
    counted: Counter[str] = Counter()
    real = matrix.craft

    def craft(attack: Any, *rest: Any) -> dict[str, Tensor]:
        counted[type(attack).__name__] += 1
        return real(attack, *rest)

    monkeypatch.setattr(matrix, "craft", craft)
    return counted


def contents(root: Path, folder: str, keep: Callable[[str], bool] = lambda name: True) -> dict[str, tuple[int, bytes]]:
    """Files below a folder with the times when they were written."""
    found = (path for path in (root / folder).rglob("*") if path.is_file() and keep(path.name))
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def equals_a_fresh_run(recipe: Recipe, root: Path, aside: Path) -> bool:
    grow(recipe, aside)
    return (root / "matrix.csv").read_bytes() == (aside / "matrix.csv").read_bytes()


# ---- attacks ----


def test_one_attack_more_leaves_every_finished_cell_as_it_is_and_trains_nothing(
    root: Path, trained: Counter[str], attacked: Counter[str]
) -> None:
    before = {part: contents(root, part) for part in ("cells", "training", "systems", "rows")}
    old, grown = (root / "recipe.yaml").read_text(), recipe_of(attacks=f"[clean, {PGD}, {NOISE}]")
    assert grow(grown, root) == "4 cells kept"
    after = contents(root, "cells")
    assert before["cells"].items() < after.items()
    assert len(after) == len(before["cells"]) + 4
    assert all(contents(root, part) == before[part] for part in ("training", "systems", "rows"))
    assert not trained
    assert attacked.keys() == {"Noise"}
    assert (root / "recipe.1.yaml").read_text() == old
    assert grow(grown, root) == ""
    assert not (root / "recipe.2.yaml").exists()


def test_a_changed_attack_under_the_same_label_is_made_anew_and_no_other(
    root: Path, tmp_path: Path, attacked: Counter[str]
) -> None:
    kept = contents(root, "cells", lambda name: "pgd" not in name)
    changed = recipe_of(attacks=f"[clean, {PGD.replace('eps: 0.2', 'eps: 0.05')}]")
    assert grow(changed, root) == "2 cells kept, 2 made anew because their row or column changed"
    assert attacked.keys() == {"PGD"}
    assert contents(root, "cells", lambda name: "pgd" not in name) == kept
    assert float(RunFolder(root).arrays("cam", "pgd")["perturbation"].max()) < 0.06
    assert equals_a_fresh_run(changed, root, tmp_path / "fresh")


# ---- rows ----


def test_a_row_that_changed_is_trained_attacked_saved_and_timed_anew(
    root: Path, tmp_path: Path, trained: Counter[str]
) -> None:
    kept = contents(root, "cells", lambda name: name.startswith("cam"))
    folder, changed = RunFolder(root), recipe_of(interpreters=f"[cam, {RTS.replace('width: 4', 'width: 8')}]")
    system = (folder.system("rts") / "system.json").read_bytes()
    said = grow(changed, root)
    assert "2 cells kept, 2 made anew because their row or column changed" in said
    assert "rts: rts changed and is trained anew" in said
    assert trained == {"rts": 1}
    assert contents(root, "cells", lambda name: name.startswith("cam")) == kept
    assert (folder.system("rts") / "system.json").read_bytes() != system
    assert len(list(root.rglob("training/*/rts.safetensors.1"))) == 1
    assert len(list(root.rglob("training/*/rts.history.json.1"))) == 1
    assert equals_a_fresh_run(changed, root, tmp_path / "fresh")


def test_a_stack_of_defenses_is_added_and_a_change_below_it_reaches_it(root: Path, trained: Counter[str]) -> None:
    below = "{name: input-transform, transforms: [%s], of: cam, label: input}"
    upon = "{name: beta-smoothing, of: input, label: both}"
    both = recipe_of(defenses=f"[{below % 'jpeg-75'}, {upon}]")
    before = contents(root, "cells")
    assert grow(both, root) == "4 cells kept"
    assert before.items() < contents(root, "cells").items()
    first = RunFolder(root).read_cell("both", "pgd")
    assert first is not None
    assert first["against_undefended"]["l1"]["count"] == 8
    said = grow(recipe_of(defenses=f"[{below % 'jpeg-30'}, {upon}]"), root)
    assert said == "4 cells kept, 4 made anew because their row or column changed"
    assert not trained
    assert RunFolder(root).read_cell("both", "pgd") != first


def test_a_removed_row_stays_on_disk_is_not_reported_and_comes_back_for_nothing(
    root: Path, trained: Counter[str], attacked: Counter[str]
) -> None:
    before = contents(root, "cells")
    assert grow(recipe_of(interpreters="[cam]"), root) == "2 cells kept"
    assert contents(root, "cells") == before
    assert {row.label for row in Results.read(RunFolder(root)).experiment.rows} == {"cam"}
    assert "rts" not in (root / "matrix.csv").read_text()
    grow(recipe_of(), root)
    assert contents(root, "cells") == before
    assert not trained
    assert not attacked


# ---- metrics, resamples and words ----


def test_metrics_go_for_nothing_and_come_with_their_attacks(root: Path, tmp_path: Path, attacked: Counter[str]) -> None:
    less, more = recipe_of(metrics="[l1]"), recipe_of(metrics="[l1, spearman]")
    assert grow(less, root) == "4 cells kept"
    assert ",l2" not in (root / "matrix.csv").read_text()
    grow(recipe_of(), root)
    assert ",l2," in (root / "matrix.csv").read_text()
    assert not attacked
    assert "metrics changed: 4 cells are measured anew, their attacks included" in grow(more, root)
    assert attacked
    assert equals_a_fresh_run(more, root, tmp_path / "fresh")


def test_resamples_pictures_and_words_need_no_system(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"evaluation__bootstrap": "80", "evaluation__pictures": "1", "about": "another text", "name": "other"}
    changed, arrays = recipe_of(**changes), contents(root, "cells", lambda name: name.endswith(".safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "Builder", None)
        grow(changed, root)
        grow(recipe_of(**{**changes, "about": "a third text"}), root)
    assert contents(root, "cells", lambda name: name.endswith(".safetensors")) == arrays
    assert json.loads((root / "run.json").read_text())["name"] == "other"
    assert "a third text" in (root / "report.html").read_text()
    assert len(list(root.glob("recipe.*.yaml"))) == 1
    assert equals_a_fresh_run(changed, root, tmp_path / "fresh")


# ---- whose directory it is ----


def test_another_foundation_is_refused_whatever_else_changed(root: Path) -> None:
    before = contents(root, ".")
    changed = {"attacks": f"[{NOISE}]", "seed": "1", "evaluation.only_correct": "false", "model.train.lr": "0.1"}
    said = r"its recipe differs \(recipe: evaluation\.only_correct, model\.train\.lr, seed\)"
    with pytest.raises(RunMismatchError, match=said):
        run(recipe_of(**changed), root)
    assert contents(root, ".") == before


def test_a_run_that_failed_at_once_has_not_claimed_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["attacks=[clean]", "interpreters=[cam]", "defenses=[]", "evaluation.only_correct=false"]
    weights = tmp_path / "right.pth"
    torch.save(build("small-cnn", num_classes=10, in_channels=1).state_dict(), weights)
    wrong = read(TINY, [*given, f"model={{name: small-cnn, weights: {tmp_path / 'wrong.pth'}}}"])
    right = read(TINY, [*given, f"model={{name: small-cnn, weights: {weights}}}"])
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"no file at .*wrong\.pth"):
        run(wrong, out)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "check_data", lambda recipe: recipe.data.load())  # as if the file were there at first
        with pytest.raises(InputError, match=r"wrong\.pth"):
            run(wrong, out)
    assert (out / "run.json").is_file()
    grow(right, out)
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "check_data", lambda recipe: recipe.data.load())
        with pytest.raises(RunMismatchError, match=r"recipe: model\.weights"):
            run(wrong, out)


def test_a_row_whose_training_starts_with_another_file_s_content_is_another(tmp_path: Path) -> None:
    path, found = tmp_path / "start.safetensors", set()
    for content in (b"one", b"two"):
        path.write_bytes(content)
        recipe = recipe_of(interpreters=f"[{RTS[:-1]}, start: '{path}'}}]")
        found.add(Origins(recipe).row("rts"))
    assert len(found) == 2


def test_a_directory_that_another_recipe_takes_over_keeps_no_system_of_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        "attacks=[clean]",
        "interpreters=[cam]",
        "defenses=[]",
        "evaluation.only_correct=false",
        "model.train=null",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(matrix.Matrix, "fill", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(read(TINY, [*given, "seed=1"]), tmp_path / "run")
    grow(read(TINY, given), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    saved = files.digest_tensors(rx.System.load(folder.system("cam")).model.state_dict())
    assert saved == json.loads((folder.root / "weights.json").read_text())["classifier"]


def test_other_weights_in_the_same_file_are_refused_when_everything_is_finished(tmp_path: Path) -> None:
    weights, given = tmp_path / "w.pth", ["attacks=[clean]", "interpreters=[cam]", "defenses=[]"]
    recipe = read(TINY, [*given, "evaluation.only_correct=false", f"model={{name: small-cnn, weights: {weights}}}"])
    model = build("small-cnn", num_classes=10, in_channels=1)
    torch.save(model.state_dict(), weights)
    grow(recipe, tmp_path / "run")
    assert grow(recipe, tmp_path / "run") == ""
    torch.save({name: value * 2 for name, value in model.state_dict().items()}, weights)
    with pytest.raises(RunMismatchError, match="another classifier's weights"):
        run(recipe, tmp_path / "run")


# ---- kills ----


@pytest.mark.parametrize("where", ["dropped", "kept", "first new cell"])
def test_killed_while_it_grows_a_run_goes_on_and_equals_an_undisturbed_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, grown: tuple[Recipe, Path]
) -> None:
    recipe, undisturbed = grown
    kept = contents(root, "cells", lambda name: name.startswith("cam--clean"))
    with monkeypatch.context() as patch:
        if where == "dropped":
            patch.setattr(RunFolder, "keep", _killed)
        elif where == "kept":
            patch.setattr(growing, "Summaries", _killed)
        else:
            patch.setattr(matrix.Matrix, "_cell", _after_one(matrix.Matrix._cell))
        with pytest.raises(KeyboardInterrupt):
            grow(recipe, root)
    if where != "dropped":  # what is reported of the half-grown run is of the new recipe alone
        table = {cell["made_of"]["column"] for cell in Results.read(RunFolder(root)).cells.values() if cell}
        new = {cell["made_of"]["column"] for cell in Results.read(RunFolder(undisturbed)).cells.values() if cell}
        assert table <= new
    grow(recipe, root)
    assert contents(root, "cells", lambda name: name.startswith("cam--clean")) == kept
    assert (root / "matrix.csv").read_bytes() == (undisturbed / "matrix.csv").read_bytes()


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe that changes a row and a column and adds another, and its run from scratch."""
    columns = f"[clean, {PGD.replace('eps: 0.2', 'eps: 0.1')}, {ADV2}, {NOISE}]"
    recipe = recipe_of(interpreters=f"[cam, {RTS.replace('width: 4', 'width: 8')}]", attacks=columns)
    root = tmp_path_factory.mktemp("grown") / "run"
    grow(recipe, root)
    return recipe, root


def _killed(*args: Any) -> None:
    raise KeyboardInterrupt


def _after_one(real: Callable[..., None]) -> Callable[..., None]:
    left = [1]

    def cell(*args: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*args)

    return cell


def test_chunks_of_an_unfinished_run_are_not_taken_for_those_of_a_changed_row_or_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: tuple[Recipe, Path], attacked: Counter[str]
) -> None:
    recipe, undisturbed = grown
    real = RunFolder.write_cell

    def killed(folder: RunFolder, row: str, column: str, *rest: Any) -> None:
        if (row, column) == ("rts", "adv2"):
            raise KeyboardInterrupt
        real(folder, row, column, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_cell", killed)
        with pytest.raises(KeyboardInterrupt):
            grow(recipe_of(attacks=f"[clean, {PGD}, {ADV2}]"), tmp_path / "run")
    for kind in ("attacked", "judged"):
        assert list((tmp_path / "run").glob(f"{kind}/*adv2*/*.safetensors"))
    attacked.clear()
    grow(recipe, tmp_path / "run")
    assert attacked["ADV2"] == 2  # both chunks on the new rts; those on cam were done
    assert (tmp_path / "run/matrix.csv").read_bytes() == (undisturbed / "matrix.csv").read_bytes()


# ---- from Python ----


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def judge(out: Path, systems: dict[str, Any], columns: dict[str, Any], **changes: Any) -> str:
    x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    heard = Heard()
    settings = changes.pop("evaluation", Evaluation(images=16, batch_size=8, bootstrap=20, pictures=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        rx.evaluate(systems, columns, (x, net(0)(x).argmax(1)), out=out, evaluation=settings,
                    session=Session(progress=heard), **changes)  # fmt: skip
    return "\n".join(line for line in heard.lines if "not saved" not in line)


def test_own_systems_and_attacks_come_and_change_and_the_other_cells_stay(tmp_path: Path) -> None:
    model = net(0)
    plain, other = (rx.System(m, interpreters.Gradient(m)) for m in (model, net(0)))
    with torch.no_grad():
        other.model[3].bias[0] += 0.05  # type: ignore[index]
    systems = {"plain": plain, "defended": (other, "plain")}
    columns = {"clean": attacks.Clean(), "pgd": attacks.PGD(steps=2)}
    assert judge(tmp_path, systems, columns) == ""
    # What the audit says of a cell may change with the columns beside it.
    before = contents(tmp_path, "cells", lambda name: name.endswith(".safetensors"))
    more = {**columns, "noise": attacks.Noise()}
    systems["third"] = rx.System(model, interpreters.IntegratedGradients(model, steps=2))
    assert judge(tmp_path, systems, more) == "4 cells kept"
    assert before.items() < contents(tmp_path, "cells").items()
    kept = contents(tmp_path, "cells", lambda name: "defended" not in name)
    with torch.no_grad():
        other.model[3].bias[0] += 0.05  # type: ignore[index]
    assert judge(tmp_path, systems, more) == "6 cells kept, 3 made anew because their row or column changed"
    assert contents(tmp_path, "cells", lambda name: "defended" not in name) == kept
    assert (tmp_path / "experiment.2.json").is_file()


def test_a_classifier_that_gets_other_inputs_right_makes_every_cell_anew(tmp_path: Path) -> None:
    plain, biased = (rx.System(m, interpreters.Gradient(m)) for m in (net(0), net(0)))
    with torch.no_grad():
        biased.model[3].bias[0] -= 0.1  # type: ignore[index]
    columns = {"clean": attacks.Clean()}
    settings = Evaluation(images=16, batch_size=8, bootstrap=20, pictures=1)
    judge(tmp_path, {"a": plain}, columns, evaluation=settings)
    judged = RunFolder(tmp_path).arrays("a", "clean")["sample"].tolist()
    said = judge(tmp_path, {"a": plain, "b": biased}, columns, evaluation=settings)
    both = [RunFolder(tmp_path).arrays(row, "clean")["sample"].tolist() for row in ("a", "b")]
    assert both[0] == both[1] != judged
    assert "other inputs are judged: 1 cells are made anew" in said
    with pytest.raises(RunMismatchError, match=r"evaluation\.targeted"):
        judge(tmp_path, {"a": plain}, columns, evaluation=replace(settings, targeted=False))


def test_attacked_inputs_that_a_failed_call_left_are_not_taken_for_those_of_other_judged_inputs(tmp_path: Path) -> None:
    class Broken(attacks.PGD):
        def __call__(self, *args: Any, **given: Any) -> Any:
            raise RuntimeError("out of memory")

    plain, biased = (rx.System(m, interpreters.Gradient(m)) for m in (net(0), net(0)))
    with torch.no_grad():
        biased.model[3].bias[0] -= 0.1  # type: ignore[index]
    pgd = attacks.PGD(eps=0.01, steps=1)
    judge(tmp_path, {"a": plain}, {"pgd": pgd, "broken": Broken(steps=1)})
    judge(tmp_path, {"a": plain, "b": biased}, {"pgd": pgd})
    assert float(RunFolder(tmp_path).arrays("a", "pgd")["perturbation"].max()) < 0.0101
