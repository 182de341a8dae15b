"""The command: what it lists, checks, reports and explains, and how it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import robustexplain
from robustexplain import files, models, recipes
from robustexplain.cli import main
from robustexplain.commands.explain import explain_image
from robustexplain.commands.list import recipe_rows, rows_of
from robustexplain.commands.options import session_of
from robustexplain.errors import RobustExplainWarning
from robustexplain.metrics import Spearman
from robustexplain.registry import ALL, Entry
from robustexplain.training import Session

TINY = Path(__file__).parents[1] / "tiny.yaml"
SMALLER = [
    *("--set", "interpreters=[cam, gradient]", "--set", "model.train.epochs=1", "--set", "evaluation.bootstrap=50"),
    *("--set", "defenses=[{name: beta-smoothing, of: gradient}]"),
    *("--set", "attacks=[clean, {name: pgd, eps: 0.2, steps: 2, step_size: 0.1}]"),
]
Call = Callable[..., tuple[int, str, str]]


def call_with(capture: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["robustexplain", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0), *capture.readouterr()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command as the shell runs it, in an empty directory: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: call_with(capsys, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few cells, made by the command."""
    root = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = ["run", TINY, *SMALLER, "--limit", 4, "--seed", 7, "--device", "cpu", "--out", root]
        patch.setattr(sys, "argv", ["robustexplain", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code in (0, None)
    return root


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture file, larger than any model here wants."""
    path = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


# ---- list ----


@pytest.mark.parametrize("kind", sorted(ALL))
def test_every_kind_is_listed_with_all_its_members(kind: str, cli: Call) -> None:
    code, out, _ = cli("list", kind)
    assert code == 0
    # Behind a transform's name stand its numbers.
    names = [f"{entry.name}-" if kind == "transforms" else f"{entry.name} " for entry in ALL[kind]]
    assert names
    shown = "".join(line.split("│")[1].strip() + " " for line in out.splitlines() if line.startswith("│"))
    assert all(name in shown for name in names), shown
    again = cli("list", ALL[kind].kind)[1]  # the singular will do
    assert again.splitlines()[1:] == out.splitlines()[1:]


def test_attacks_are_listed_with_paper_needs_and_defaults(cli: Call) -> None:
    _, out, _ = cli("list", "attacks")
    text = " ".join(out.replace("│", " ").split())
    for words in ("Zhang et al. 2020", "differentiable", "steps=1200", "eps=0.031"):
        assert words in text


def test_markdown_has_a_line_for_each(cli: Call) -> None:
    code, out, _ = cli("list", "defenses", "--markdown")
    assert code == 0
    lines = out.strip().splitlines()
    assert lines[0] == "| defense | what it does | paper |"
    assert [line.split("`")[1] for line in lines[2:]] == [entry.name for entry in ALL["defenses"]]
    assert all(line.replace(r"\|", "").count("|") == 4 for line in lines), "a bar in a cell would end it"


def test_an_unknown_kind_is_refused_with_the_nearest(cli: Call) -> None:
    code, _, said = cli("list", "atacks")
    assert code == 2
    assert "unknown kind 'atacks'; did you mean 'attacks'" in said


def test_nested_settings_are_listed_one_level_deep(cli: Call) -> None:
    shown = {name: settings for name, *_, settings in rows_of("defenses")}["aid"]
    for words in ("training={epochs=8", "attack={seed=0, eps=0.031, steps=20", "mask={...}}"):
        assert words in shown
    assert "epochs=8" in " ".join(cli("list", "defenses")[1].replace("│", " ").split())


def test_recipes_are_listed_with_what_they_show_and_need_and_how_long_they_take(cli: Call) -> None:
    code, out, _ = cli("list", "recipes")
    assert code == 0
    assert "quickstart" in out.splitlines()[4]
    rows = recipe_rows()
    assert [name for name, *_ in rows] == recipes.names()
    for name, shows, needs, takes in rows:
        assert shows, name
        assert takes, name
        assert needs or "data: {name: digits}" in recipes.path(name).read_text(), name
    (line,) = (line for line in cli("list", "recipes", "--markdown")[1].splitlines() if "`quickstart`" in line)
    assert "forged on real digits, and which of four defenses hold, against an attacker that knows of no" in line
    assert line.endswith("| - | about seven minutes on two CPU cores. |")


def test_shapes_in_square_brackets_are_shown_as_they_are(cli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("odd", lambda: None, paper="[red]A 2026[/red] :smile:", needs=("[B, D]",))
    monkeypatch.setitem(ALL["defenses"]._entries, "odd", entry)
    out = cli("list", "defenses")[1]
    assert "[red]A 2026[/red] :smile:" in out
    assert "[B, D]" in out


# ---- copy, version ----


def test_a_recipe_is_copied_with_the_commands_that_come_next(cli: Call) -> None:
    code, out, _ = cli("copy", "quickstart")
    assert code == 0
    assert out.splitlines() == [
        "written: quickstart.yaml",
        "next: robustexplain validate quickstart.yaml",
        "then: robustexplain run quickstart.yaml",
    ]
    assert Path("quickstart.yaml").read_bytes() == recipes.path("quickstart").read_bytes()
    out = cli("copy", "paper/sanity-lite0", "my own.yaml")[1]
    assert "needs: pip install" in out
    assert "then: robustexplain sanity 'my own.yaml' --set data.path=FOLDER" in out
    Path("mine").mkdir()
    assert "written: mine/quickstart.yaml" in cli("copy", "recipes/quickstart.yaml", "mine")[1]


def test_copy_replaces_no_file_without_force(cli: Call) -> None:
    Path("quickstart.yaml").write_text("mine")
    code, _, said = cli("copy", "quickstart")
    assert (code, Path("quickstart.yaml").read_text()) == (2, "mine")
    assert "quickstart.yaml is there already; --force replaces it" in said
    assert cli("copy", "quickstart", "--force")[0] == 0
    assert Path("quickstart.yaml").read_bytes() == recipes.path("quickstart").read_bytes()


@pytest.mark.parametrize(
    "words,expected",
    [
        (["quikstart"], "unknown recipe 'quikstart'; did you mean 'quickstart'"),
        (["quickstart", "no/where.yaml"], "no/where.yaml cannot be written: no is no directory"),
    ],
)
def test_a_copy_that_cannot_be_made_is_refused(words: list[str], expected: str, cli: Call) -> None:
    code, _, said = cli("copy", *words)
    assert code == 2
    assert expected in said


def test_the_version_is_that_of_the_package(cli: Call) -> None:
    assert cli("--version") == (0, f"robustexplain {robustexplain.__version__}\n", "")


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    code = (
        "import sys, typer.main; from robustexplain.cli import app; group = typer.main.get_command(app);"
        "[c.get_help(typer.Context(c, info_name=n)) for n, c in group.commands.items()];"
        "print(len(group.commands), [m for m in ('torch', 'numpy', 'matplotlib', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "12 []"


# ---- Ctrl-C ----


@pytest.mark.parametrize("times", [1, 2, 3])
def test_however_often_ctrl_c_is_pressed_the_exit_code_is_130(times: int) -> None:
    """Once in the work, once while that is being handled, once while Python shuts down."""
    code = f"""
import atexit, os, signal, time
import robustexplain.cli as cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have left it ignored
left = {times}

def press():
    global left
    if left:
        left -= 1
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

def app():
    try:
        press()
    finally:
        press()

atexit.register(press)
cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "")


# ---- validate ----


def test_validate_takes_the_seed_and_the_limit_of_run(cli: Call) -> None:
    assert cli("validate", TINY, "--seed", 3, "--limit", 4)[0] == 0
    code, _, said = cli("validate", TINY, "--seed", -1)
    assert code == 2
    assert "seed: a whole number of at least 0 is needed, got -1" in said


def test_validate_counts_the_cells(cli: Call) -> None:
    assert cli("validate", TINY) == (0, "tiny: 4 rows x 6 columns = 24 cells; all well\n", "")
    assert "2 rows x 6 columns" in cli("validate", TINY, "--set", "defenses=[]")[1]


def test_validate_can_leave_the_data_aside(cli: Call) -> None:
    change = ["--set", "data={name: image-folder, path: /no/images}"]
    assert cli("validate", TINY, *change)[0] == 2
    assert cli("validate", TINY, *change, "--no-data")[0] == 0


# ---- run ----


def test_run_writes_where_out_says_with_the_seed_and_the_limit(finished: Path) -> None:
    assert json.loads((finished / "run.json").read_text())["seed"] == 7
    cells = [json.loads(path.read_text()) for path in (finished / "cells").glob("*.json")]
    assert len(cells) == 6
    assert {cell["status"] for cell in cells} == {"done"}
    assert {cell["measures"]["success"]["count"] for cell in cells} == {4}
    assert (finished / "report.html").is_file()


def test_run_defaults_to_a_folder_of_the_recipes_name_and_shows_the_matrix(cli: Call) -> None:
    change = ["--set", "interpreters=[{name: cam, label: '[b]cam[/b] :x:'}]", "--set", "defenses=[]"]
    code, out, _ = cli("run", TINY, *SMALLER, *change, "--set", "attacks=[clean]", "--limit", 2)
    assert code == 0
    assert "[b]cam[/b] :x:" in out
    assert "tiny: clean inputs that are right, 2 images" in " ".join(out.split())
    assert "report: runs/tiny/report.html" in out
    assert Path("runs/tiny/report.html").is_file()


def test_run_with_failed_cells_ends_with_code_1_and_says_where_to_look(
    cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustexplain.attacks import PGD

    def broken(*args: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(PGD, "plan", broken)
    code, _, said = cli("run", TINY, *SMALLER, "--limit", 2, "--out", "r")
    assert code == 1
    assert "3 cells failed; r/report.html shows which and why" in said


@pytest.mark.parametrize(
    "words,expected",
    [
        (["--device", "gpu"], "--device: expected cpu, cuda or mps, got 'gpu'"),
        (["--seed", "-1"], "seed: a whole number of at least 0 is needed, got -1"),
        (["--limit", "0"], "--limit"),
        (["--out", "cat.png"], "cat.png is a file; --out needs a directory"),
        (["--out", "."], "is not empty and is no run directory"),
        (["--colour", "red"], "No such option"),
    ],
)
@pytest.mark.usefixtures("picture")
def test_bad_options_of_run_are_refused(words: list[str], expected: str, cli: Call) -> None:
    code, _, said = cli("run", TINY, *words)
    assert code == 2
    assert expected in said
    assert "Traceback" not in said


def test_run_tells_trackers_and_takes_trainings_from_another_run(cli: Call, finished: Path) -> None:
    pytest.importorskip("tensorboard")
    words = ["run", TINY, *SMALLER, "--seed", 7, "--device", "cpu", "--limit", 2, "--set", "attacks=[clean]"]
    words += ["--set", "interpreters=[cam]", "--set", "defenses=[]"]
    code, _, said = cli(*words, "--out", "a", "--track", "tensorboard")
    assert code == 0
    assert "classifier: 1 epoch, loss" in said
    assert list(Path("a/training/tensorboard/classifier").glob("events.*"))
    code, _, said = cli(*words, "--out", "b", "--reuse", finished, "--reuse", "a")
    assert code == 0
    assert "classifier: taken from" in said
    assert "epoch, loss" not in said


@pytest.mark.parametrize("verb", ["run", "sanity"])
def test_a_tracker_whose_package_is_not_there_names_the_extra(
    verb: str, cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, _, said = cli(verb, TINY, "--track", "tensorboard")
    assert code == 2
    assert "pip install 'robustexplain[tracking]'" in said
    assert not Path("runs").exists()


def test_processes_of_the_command_and_of_a_session_wait_for_the_slowest_chunk() -> None:
    for session in (session_of("cpu"), Session()):
        settings = session.accelerator.init_handler
        assert settings is not None
        assert settings.timeout >= timedelta(days=1)


def test_a_run_of_another_recipe_is_refused(cli: Call, finished: Path) -> None:
    code, _, said = cli("run", TINY, *SMALLER, "--limit", 4, "--seed", 8, "--out", finished)
    assert code == 2
    assert "its recipe differs (recipe: seed)" in said


@pytest.mark.parametrize("words", [["run", "nothing.yaml"], ["validate", "nothing"], ["validate", "."]])
def test_a_recipe_that_is_not_there_is_refused_with_those_that_are(words: list[str], cli: Call) -> None:
    code, _, said = cli(*words)
    assert code == 2
    assert "quickstart" in said


# ---- report ----


def test_report_is_written_again_from_the_cells(cli: Call, finished: Path, tmp_path: Path) -> None:
    root = shutil.copytree(finished, tmp_path / "copy")
    before = {name: (root / name).read_bytes() for name in ("report.html", "matrix.csv", "matrix.png")}
    for name in before:
        (root / name).unlink()
    next((root / "cells").glob("cam-*clean*.json")).rename(root / "cells" / "gone")
    code, out, _ = cli("report", root)
    assert code == 0
    assert "joint success where clean inputs are right, 4 images" in " ".join(out.split())
    assert "1 of 6 cells failed or are missing" in (root / "report.html").read_text()
    (root / "cells" / "gone").rename(next((root / "cells").glob("cam-*clean*.safetensors")).with_suffix(".json"))
    assert cli("report", root)[0] == 0
    assert {name: (root / name).read_bytes() for name in before} == before


def test_report_of_what_is_no_run_is_refused(cli: Call, tmp_path: Path) -> None:
    code, _, said = cli("report", tmp_path)
    assert code == 2
    assert "is no run directory: it has no run.json" in said


# ---- explain ----


def test_explain_with_the_systems_of_a_run(cli: Call, finished: Path, picture: Path) -> None:
    code, out, _ = cli("explain", picture, "--run", finished, "--out", "seen.png")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "cam", "gradient", "beta-smoothing (gradient)", "picture",
    ]  # fmt: skip
    with Image.open("seen.png") as shown:
        assert shown.width > 2 * shown.height
    one = cli("explain", picture, "--run", finished, "--row", "gradient", "--out", "one.png")[1]
    assert one.splitlines()[0] == out.splitlines()[1]
    assert len(one.splitlines()) == 2


def test_a_model_without_weights_is_said_to_be_one_and_takes_a_file(cli: Call, picture: Path) -> None:
    with pytest.warns(RobustExplainWarning, match="small-cnn has random weights"):
        explain_image(picture, None, [], "small-cnn", ["cam"], Path("one.png"))
    save_file(models.load("small-cnn", seed=3).state_dict(), "weights.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustExplainWarning)
        weights = Path("weights.safetensors")
        explain_image(picture, None, [], "small-cnn", ["cam"], Path("two.png"), weights=weights)
    words = (picture, "--model", "small-cnn", "--interpreter", "cam")
    first, (code, out, _) = cli("explain", *words)[1], cli("explain", *words, "--weights", "weights.safetensors")
    assert code == 0
    assert out != first
    assert cli("attack", *words, *FEW, "--weights", "weights.safetensors")[0] == 0


def test_explain_with_a_model_by_name(cli: Call, picture: Path) -> None:
    code, out, _ = cli("explain", picture, "--model", "small-cnn", "--interpreter", "cam", "--interpreter", "gradient")
    assert code == 0
    cam, gradient, where = out.splitlines()
    assert cam.removeprefix("cam: ") == gradient.removeprefix("gradient: ")
    assert where == "picture: explained.png"
    assert Path("explained.png").is_file()


@pytest.mark.parametrize(
    "words,expected",
    [
        (["cat.png"], "explain needs either --run DIRECTORY or --model NAME"),
        (["cat.png", "--run", "x", "--model", "small-cnn"], "explain needs either --run DIRECTORY or --model NAME"),
        (["cat.png", "--run", "x"], "x is no run directory"),
        (["cat.png", "--model", "smal-cnn"], "unknown model 'smal-cnn'; did you mean 'small-cnn'"),
        (["cat.png", "--model", "small-cnn", "--interpreter", "kam"], "unknown interpreter 'kam'; did you mean 'cam'"),
        (["cat.png", "--model", "small-cnn", "--interpreter", "rts"], "'rts' is trained: a recipe trains it"),
        (
            ["cat.png", "--model", "small-cnn", "--interpreter", "smoothed"],
            "'smoothed' is made of other parts",
        ),
        (
            ["cat.png", "--model", "small-cnn", "--interpreter", "aggregate"],
            "'aggregate' is made of other parts",
        ),
        (["cat.png", "--model", "small-cnn", "--row", "cam"], "--row goes with --run, and --model was given"),
        (["cat.png", "--run", "x", "--interpreter", "cam"], "--interpreter goes with --model, and --run was given"),
        (["cat.png", "--run", "x", "--weights", "y"], "--weights goes with --model, and --run was given"),
        (["cat.png", "--model", "small-cnn", "--out", "."], "--out . is a folder"),
        (["dog.png", "--model", "small-cnn"], "no image at dog.png"),
        (["words.txt", "--model", "small-cnn"], "cannot read the image 'words.txt'"),
        (["half.png", "--model", "small-cnn"], "cannot read the image 'half.png'"),
        (["cat.png", "--model", "small-cnn", "--size", "0"], "--size"),
    ],
)
def test_bad_input_of_explain_is_refused(words: list[str], expected: str, cli: Call, picture: Path) -> None:
    Path("words.txt").write_text("no image")
    Path("half.png").write_bytes(picture.read_bytes()[:2000])
    code, _, said = cli("explain", *words)
    assert code == 2
    assert expected in said
    assert "Traceback" not in said
    assert not Path("explained.png").exists()


# ---- attack ----

FEW = ("--set", "steps=6", "--set", "eps=8/255")


def test_attack_writes_the_image_the_maps_and_the_numbers(cli: Call, picture: Path) -> None:
    words = ("attack", picture, "--model", "small-cnn", "--interpreter", "cam", "--goal-class", 3)
    code, out, _ = cli(*words, *FEW, "--out", "made")
    assert code == 0
    found = json.loads(Path("made/numbers.json").read_text())
    assert f"success: {found['success']}" in out
    assert found["goal_class"] == 3
    assert found["success"] == (found["attacked"]["prediction"] == 3)
    arrays, _ = files.read_tensors(Path("made/attacked.safetensors"))
    change = (arrays["attacked_x"] - arrays["x"]).abs().max()
    assert found["perturbation_linf"] == pytest.approx(float(change), abs=1e-7)
    assert 0 < float(change) <= 8 / 255 + 1e-6
    with Image.open("made/attacked.png") as image:
        stored = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert float((stored - arrays["attacked_x"][0]).abs().max()) <= 0.5 / 255 + 1e-6
    with Image.open("made/compare.png") as shown:
        assert shown.width > 4 * shown.height


def test_attack_writes_what_is_undefined_on_a_constant_map_as_nothing(
    cli: Call, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spearman, "_measure", lambda self, maps, reference: torch.full((len(maps),), torch.nan))
    code, _, _ = cli("attack", picture, "--model", "small-cnn", "--interpreter", "cam", *FEW, "--out", "made")
    assert code == 0
    assert json.loads(Path("made/numbers.json").read_text())["map_rank_correlation"] is None


def test_attack_takes_a_system_of_a_run(cli: Call, finished: Path, picture: Path) -> None:
    words = ("attack", picture, "--run", finished, "--row", "gradient", "--untargeted", *FEW, "--out", "made")
    code, out, _ = cli(*words)
    assert code == 0
    assert out.startswith("system: gradient\n")
    assert json.loads(Path("made/numbers.json").read_text())["goal_class"] is None


@pytest.mark.parametrize(
    "words,expected",
    [
        (["cat.png"], "attack needs either --run DIRECTORY or --model NAME"),
        (["cat.png", "--model", "small-cnn", "--attack", "adv3"], "unknown attack 'adv3'; did you mean 'adv2'"),
        (["cat.png", "--model", "small-cnn", "--set", "stepz=3"], "adv2.stepz: unknown key; did you mean 'steps'"),
        (["cat.png", "--model", "small-cnn", "--set", "steps"], "--set takes key=value, got 'steps'"),
        (["cat.png", "--model", "small-cnn", "--goal-map", "cat"], "--goal-map: expected benign or random-patch"),
        (["cat.png", "--model", "small-cnn", "--goal-class", "10000"], "goal_class holds class 10000"),
        (["cat.png", "--model", "small-cnn", "--goal-class", "1", "--untargeted"], "contradict each other"),
        (["cat.png", "--model", "small-cnn", "--row", "cam"], "--row goes with --run, and --model was given"),
        (["cat.png", "--run", "x", "--interpreter", "cam"], "--interpreter goes with --model, and --run was given"),
        (["cat.png", "--model", "small-cnn", "--out", "cat.png"], "--out cat.png is a file"),
        (["dog.png", "--model", "small-cnn"], "no image at dog.png"),
    ],
)
def test_bad_input_of_attack_is_refused(words: list[str], expected: str, cli: Call, picture: Path) -> None:
    code, _, said = cli("attack", *words)
    assert code == 2
    assert expected in said
    assert "Traceback" not in said
    assert not Path("attacked").exists()


def test_an_unknown_row_of_the_run_is_refused(cli: Call, finished: Path, picture: Path) -> None:
    code, _, said = cli("explain", picture, "--run", finished, "--row", "kam")
    assert code == 2
    assert "has no row 'kam'; it has: cam, gradient, beta-smoothing (gradient)" in said
