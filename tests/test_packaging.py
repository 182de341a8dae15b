"""The wheel holds the whole house, and no folder of a user's can get in its way, checked out or installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny.yaml"
PARTS = ("robustexplain", "attacks", "defenses", "recipes", "tests", "pyproject.toml", "README.md", "LICENSE")
ROOMS = (
    "attacks",
    "defenses",
    "defenses.detection",
    "defenses.models",
    "training",
    "recipes",
    "evaluation",
    "interpreters",
    "models",
    "data",
    "metrics",
)
FEW = [
    *("--set", "model.train.epochs=1", "--set", "interpreters=[gradcam]", "--set", "evaluation.bootstrap=50"),
    *("--set", "data.fractions=[0.1, 0.1, 0.8]", "--set", "defenses=[{name: beta-smoothing, of: gradcam}]"),
    *("--set", "attacks=[clean, {name: pgd, eps: 0.2, steps: 2}]", "--set", "evaluation.calibration=40"),
]

pytestmark = pytest.mark.slow


def call(*words: object, cwd: Path) -> str:
    """Run a command; its output, or a failed test with what it said."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    line = list(map(str, words))
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    dirt = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*_cache")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=dirt)
        elif source.is_file():
            shutil.copy(source, copy / part)
    if not (copy / "README.md").exists():
        (copy / "README.md").write_text("# RobustExplain\n")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network."""
    out = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(checkout, out / "source")
    words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", out, source]
    call(sys.executable, *words, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def dependencies(folder: Path) -> Path:
    """This environment's packages without ours, which may be installed in it and would be found first."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "robustexplain" not in entry.name.lower():
            (folder / entry.name).symlink_to(entry)
    return folder


def environment(folder: Path, *install: object) -> Path:
    """The interpreter of an empty venv that sees this environment's packages, with ours installed as told."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "dependencies.pth").write_text(f"{dependencies(folder / 'dependencies')}\n")
    words = [
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "--no-index",
    ]
    call(python, *words, "--ignore-installed", *install, cwd=folder)
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("plain") / "venv", wheel)


@pytest.fixture(scope="module")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("editable") / "venv", "-e", checkout)


def test_the_wheel_holds_all_rooms_the_recipes_the_template_and_the_typing_marker(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = set()
    for room, home in (("robustexplain", ""), *((r, f"{r}/") for r in ("attacks", "defenses", "recipes"))):
        for path in (checkout / room).rglob("*"):
            if path.suffix in (".py", ".yaml", ".j2", ".typed"):
                expected.add(f"robustexplain/{home}{path.relative_to(checkout / room).as_posix()}")
    assert names == expected
    for name in ("py.typed", "evaluation/report.html.j2", "recipes/quickstart.yaml", "attacks/joint/adv2.py"):
        assert f"robustexplain/{name}" in names


def test_an_installed_package_runs_where_folders_of_the_same_names_lie_about(installed: Path, tmp_path: Path) -> None:
    for name in ("attacks", "defenses", "recipes", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the folder of the user was imported')\n")
    command = installed.parent / "robustexplain"
    call(command, "run", "quickstart", "--limit", 2, "--out", "out", *FEW, cwd=tmp_path)
    assert (tmp_path / "out" / "report.html").is_file()
    call(installed, "-m", "robustexplain", "list", "attacks", cwd=tmp_path)
    call(installed, "-c", "import robustexplain.attacks, robustexplain.defenses, robustexplain.recipes", cwd=tmp_path)


@pytest.mark.parametrize("kind", ["installed", "editable"])
@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_every_room_is_importable_from_the_checkout_and_from_elsewhere(
    kind: str, place: str, checkout: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python: Path = request.getfixturevalue(kind)
    cwd = checkout if place == "checkout" else tmp_path
    modules = ", ".join(f"robustexplain.{room}" for room in ROOMS)
    said = call(python, "-c", f"import {modules}; print(robustexplain.attacks.__file__)", cwd=cwd)
    inside = Path(said.strip()).is_relative_to(checkout)
    assert inside == (kind == "editable" or place == "checkout")


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_the_command_pytest_and_accelerate_work_from_the_checkout(
    kind: str, checkout: Path, request: pytest.FixtureRequest
) -> None:
    python: Path = request.getfixturevalue(kind)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    assert "Attack explanations" in call(python, "-m", "robustexplain", "--help", cwd=checkout)
    assert "Attack explanations" in call(python, *launch, "-m", "robustexplain", "--help", cwd=checkout)
    said = call(
        python,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/recipe/test_recipe.py",
        cwd=checkout,
    )
    assert "tests/recipe/test_recipe.py::" in said
    assert "error" not in said.lower().split("test_recipe.py::")[-1]
