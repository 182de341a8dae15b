"""A recipe alone never runs code: a file of one's own runs with --trust-code, as it was when the recipe was read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import robustexplain as rx
from robustexplain import attacks, interpreters
from robustexplain.cli import main
from robustexplain.data import InputSpec
from robustexplain.errors import InputError, MissingDataError, RobustExplainWarning
from robustexplain.evaluation import Evaluation, RunFolder
from robustexplain.recipe import check, check_data, read

CODE = """
from pathlib import Path
import torch
from torch import nn
from robustexplain import data

Path(__file__).with_name("ran").touch()

class MyNet(nn.Module):
    def __init__(self, num_classes=3, in_channels=3, width=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

class Softmax(MyNet):
    def forward(self, x):
        return super().forward(x).softmax(1)

class Pair(MyNet):
    def forward(self, x):
        return super().forward(x), None

class Fails(MyNet):
    def forward(self, x):
        raise RuntimeError("no luck\\nat all")

def one():
    return MyNet(num_classes=1, in_channels=1)

def number():
    return 3

class Prepared(MyNet):
    # Preprocessing of one's own: another size, other grey values, and an answer in a dictionary.
    def forward(self, x):
        x = nn.functional.interpolate(x, size=(8, 8), mode="bilinear")
        return {"input": x, "logits": super().forward((1 - x) * 2 - 1)}

def digits(size=16):
    return data.load("digits", size=size)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe beside the code that it names."""
    (tmp_path / "mine.py").write_text(CODE)
    tree = {
        "name": "own",
        "data": {"name": "digits", "size": 16},
        "model": {"file": "mine.py", "name": "MyNet", "options": {"width": 5}},
        "interpreters": ["gradient", {"name": "gradcam", "layer": "features"}],
        "attacks": ["clean"],
        "evaluation": {"images": 4, "batch_size": 4, "bootstrap": 20, "pictures": 1, "only_correct": False},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["robustexplain", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0), "".join(capsys.readouterr())


def refusal(folder: Path, *changes: str) -> str:
    with pytest.raises(InputError) as error:
        check_data(read(folder / "r.yaml", changes, trust_code=True))
    return str(error.value)


@pytest.mark.parametrize("command", ["run", "validate", "sanity"])
def test_nothing_runs_without_the_flag(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = cli(monkeypatch, capsys, command, folder / "r.yaml")
    assert code == 2
    assert f"would run the code of {folder / 'mine.py'} (MyNet); if you trust it, say so: --trust-code" in said
    assert not (folder / "ran").exists()


def test_a_recipe_cannot_trust_itself(folder: Path) -> None:
    with pytest.raises(InputError, match="would run the code of"):
        check_data(check(yaml.safe_load((folder / "r.yaml").read_text())))
    with pytest.raises(InputError, match=r"model\.trusted: unknown key"):
        read(folder / "r.yaml", ["model.trusted=true"], trust_code=True)
    assert not (folder / "ran").exists()


def test_a_run_is_made_resumed_reported_and_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    run = ("run", "r.yaml", "--out", "out", "--device", "cpu", "--trust-code")
    assert cli(monkeypatch, capsys, *run)[0] == 0
    before = (folder / "out" / "matrix.csv").read_text()
    assert cli(monkeypatch, capsys, *run)[0] == 0
    assert cli(monkeypatch, capsys, "report", "out")[0] == 0
    assert (folder / "out" / "matrix.csv").read_text() == before
    Image.new("L", (16, 16), 99).save("a.png")
    explain = ("explain", "a.png", "--run", "out")
    code, said = cli(monkeypatch, capsys, *explain)
    assert (code, "--trust-code" in said) == (2, True)
    code, said = cli(monkeypatch, capsys, *explain, "--trust-code")
    assert (code, said.count(": class ")) == (0, 2)
    (folder / "mine.py").write_text(CODE + "\n# another file")
    code, said = cli(monkeypatch, capsys, *run)
    assert (code, "recipe differs (recipe: model.sha256)" in said) == (2, True)
    code, said = cli(monkeypatch, capsys, *explain, "--trust-code")
    assert (code, "is another file than the recipe's: its SHA-256 is" in said) == (2, True)


def test_the_same_code_elsewhere_is_the_same_experiment(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("mine.py", "r.yaml"):
        (other / name).write_text((folder / name).read_text())
    first, second = (read(place / "r.yaml", trust_code=True) for place in (folder, other))
    assert first.model.file != second.model.file
    assert first.digest == second.digest
    (other / "mine.py").write_text(CODE + "#")
    assert read(other / "r.yaml", trust_code=True).digest != first.digest


def test_it_is_made_for_the_data_and_from_the_seed(folder: Path) -> None:
    recipe = read(folder / "r.yaml", trust_code=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (recipe.model.load((1, 16, 16), 10, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    x = torch.rand(3, 1, 16, 16)
    assert first(x).shape == (3, 10)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert not first.training
    assert (first.in_channels, first.num_classes, first.features[0].out_channels) == (1, 10, 5)  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    "change,expected",
    [
        (
            "model.name=nope",
            "has no class or function 'nope'; it has MyNet, Softmax, Pair, Fails, one, number, Prepared, digits",
        ),
        ("model.options.wide=3", "MyNet of {file} has no option 'wide'; it has num_classes, in_channels, width"),
        ("model={file: mine.py, name: number}", "number of {file} must make a torch.nn.Module, got int"),
        ("model={file: mine.py, name: Pair}", "must give one tensor of logits [B, 10], got tuple"),
        ("model={file: mine.py, name: one}", "must give logits [B, K] with K = 10 classes of the data"),
        ("model={file: mine.py, name: Fails}", "{file}, line 27 (Fails): RuntimeError: no luck at all"),
        ("model.pretrained=true", "model.pretrained: code of one's own has no pretrained weights"),
        ("data={file: mine.py, name: number}", "data: number of {file} must make a robustexplain.data.Data, got int"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change: str, expected: str, folder: Path) -> None:
    said = refusal(folder, change)
    assert expected.format(file=folder / "mine.py") in said
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize(
    "code,expected",
    [("x = (", "SyntaxError"), ("import nowhere_to_be_found", ", line 1 (MyNet): ModuleNotFoundError: No module")],
)
def test_an_exception_in_the_file_is_one_line(code: str, expected: str, folder: Path) -> None:
    (folder / "mine.py").write_text(code)
    said = refusal(folder)
    assert expected in said
    assert "\n" not in said


def test_probabilities_are_warned_about(folder: Path) -> None:
    with pytest.warns(RobustExplainWarning, match="logits are needed, not probabilities"):
        check_data(read(folder / "r.yaml", ["model.name=Softmax"], trust_code=True))


def test_a_data_set_of_ones_own(folder: Path) -> None:
    changes = ["data={file: mine.py, name: digits, options: {size: 24}}", "model=small-cnn", "interpreters=[gradient]"]
    with pytest.raises(InputError, match=r"mine\.py \(digits\); if you trust it"):
        read(folder / "r.yaml", changes)
    recipe = read(folder / "r.yaml", changes, trust_code=True)
    assert check_data(recipe).shape == (1, 24, 24)
    assert recipe.source["data"]["sha256"]


def test_a_file_that_is_not_there(folder: Path) -> None:
    (folder / "mine.py").unlink()
    with pytest.raises(MissingDataError, match="no Python file at"):
        read(folder / "r.yaml", trust_code=True)


@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_preprocessing_of_ones_own_is_judged_on_the_images_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    tree = yaml.safe_load((folder / "r.yaml").read_text())
    tree["model"] = {"file": "mine.py", "name": "Prepared", "output": "logits"}
    tree["attacks"] = ["clean", {"name": "pgd", "steps": 3, "eps": 0.2}]
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    status, said = cli(monkeypatch, capsys, "run", "r.yaml", "--trust-code", "--out", "run")
    assert status == 0, said
    arrays = RunFolder(folder / "run").arrays("gradcam", "pgd")
    moved = (arrays["attacked_x"] - arrays["x"]).abs()
    assert moved.shape == (1, 1, 16, 16)
    assert moved.max() > 0
    # Without packaging, from Python.
    own = read(folder / "r.yaml", trust_code=True).model
    model = own.load((1, 16, 16), 10, 0)
    plain = rx.System(model, interpreters.GradCAM(model, layer="features"), inputs=InputSpec((16, 16), channels=1))
    x = torch.rand(6, 1, 16, 16)
    results = rx.evaluate(
        {"mine": plain}, {"pgd": attacks.PGD(steps=2)}, (x, model(x).argmax(1)), out="python",
        evaluation=Evaluation(images=4, bootstrap=20, pictures=1),
    )  # fmt: skip
    assert 0 <= results.measure("mine", "pgd", "joint")["value"] <= 1
