"""Damaged and changed files of a run: named, left out of the report, and made anew where they can be."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from robustexplain import files, seals
from robustexplain.errors import DamagedFileError, RobustExplainWarning
from robustexplain.evaluation import Results, RunFolder, run, write_report
from robustexplain.evaluation.matrix import Matrix
from robustexplain.evaluation.shards import Shards
from robustexplain.recipe import read
from robustexplain.recipe.experiment import Recipe
from robustexplain.training import Session, histories

TINY = Path(__file__).parents[1] / "tiny.yaml"
SMALL = [
    *("interpreters=[cam, gradient]", "model.train.epochs=1", "defenses=[]", "evaluation.bootstrap=50"),
    *("attacks=[clean, {name: pgd, eps: 0.2, steps: 2, step_size: 0.1}]", "evaluation.images=8"),
]


class Said:
    """A progress display that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> object:
        from robustexplain.progress import Silent

        return getattr(Silent(), name)


def run_again(root: Path) -> tuple[int, str]:
    said = Said()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed = run(recipe(), root, Session(progress=said))  # type: ignore[arg-type]
    return failed, "\n".join(said.lines)


def recipe() -> Recipe:
    return read(TINY, SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests work on copies."""
    root = tmp_path_factory.mktemp("damage") / "run"
    assert run_again(root)[0] == 0
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def edited(path: Path) -> None:
    """As somebody does who wants other figures."""
    content = json.loads(path.read_text())
    content["measures"]["joint"]["value"] = 0
    path.write_text(json.dumps(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def arrays_cut(path: Path) -> None:
    cut(path.with_suffix(".safetensors"))


def arrays_gone(path: Path) -> None:
    path.with_suffix(".safetensors").unlink()


def swapped(path: Path) -> None:
    """The cell of another place."""
    clean = path.with_name(path.name.replace(path.name.partition("--")[2], "")).parent
    other = next(p for p in sorted(clean.glob("*.json")) if p != path)
    for ending in (".json", ".safetensors"):
        shutil.copyfile(other.with_suffix(ending), path.with_suffix(ending))


@pytest.mark.parametrize("harm", [edited, cut, deep, arrays_cut, arrays_gone, swapped])
def test_a_cell_that_is_damaged_or_changed_is_named_and_left_out(harm: Callable[[Path], None], root: Path) -> None:
    path = RunFolder(root).cell("cam", "pgd")
    harm(path)
    results = Results.read(RunFolder(root))
    assert results.cells["cam", "pgd"] is None
    assert [path.with_suffix("").name in why for why in results.damaged] == [True]


def test_damaged_cells_are_made_anew(root: Path) -> None:
    folder, table = RunFolder(root), (root / "matrix.csv").read_bytes()
    for harm, (row, column) in zip((edited, arrays_cut), (("cam", "pgd"), ("gradient", "clean")), strict=True):
        harm(folder.cell(row, column))
    said = write_report(folder).read_text().replace("&#39;", "'")
    assert all(f"left out: {why}" in said for why in Results.read(folder).damaged)
    failed, said = run_again(root)
    assert failed == 0
    assert said.startswith("damaged: ")
    assert said.count("\ndamaged: ") == 1
    assert "cam / pgd is made anew" in said
    assert (root / "matrix.csv").read_bytes() == table
    assert Results.read(folder).damaged == ()


def test_a_cell_of_another_run_is_no_cell_of_this_one(root: Path) -> None:
    folder = RunFolder(root)
    path = folder.cell("cam", "pgd")
    found = seals.read(path)
    seals.write(path, {**found, "run": "another"}, path.with_suffix(".safetensors"))
    assert "of another run" in Results.read(folder).damaged[0]


def test_a_recipe_that_was_edited_after_the_run_is_not_reported(root: Path) -> None:
    """Otherwise the report says an eps that no cell was made with."""
    folder, path = RunFolder(root), root / "recipe.yaml"
    path.write_text(path.read_text().replace("eps: 0.2", "eps: 0.01"))
    with pytest.raises(DamagedFileError, match=r"recipe.yaml was changed since the run"):
        write_report(folder)
    assert run_again(root)[0] == 0
    assert "eps: 0.2" in path.read_text()
    write_report(folder)


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_what_can_be_made_again_is(harm: Callable[[Path], None], root: Path) -> None:
    paths = [RunFolder(root).row("cam"), *(root / name for name in ("recipe.yaml", "weights.json", "judged.json"))]
    for path in paths:
        harm(path)
    with pytest.raises(DamagedFileError, match=r"recipe.yaml .*`robustexplain run` with the (same recipe|recipe that)"):
        Results.read(RunFolder(root))
    RunFolder(root).cell("gradient", "pgd").unlink()
    assert run_again(root)[0] == 0
    assert all(path.is_file() for path in paths)
    assert Results.read(RunFolder(root)).damaged == ()


@pytest.mark.parametrize("harm", [cut, deep])
def test_without_its_identity_a_run_is_neither_reported_nor_gone_on_with(
    harm: Callable[[Path], None], root: Path
) -> None:
    harm(root / "run.json")
    for use in (run_again, lambda root: Results.read(RunFolder(root))):
        with pytest.raises(DamagedFileError, match=r"run.json .*; it says what the run is: restore it from a copy"):
            use(root)


def test_a_damaged_checkpoint_is_trained_anew_and_a_damaged_chunk_made_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (root / "matrix.csv").read_bytes()
    for path in root.glob("cells/*"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Matrix, "_cell", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_again(root)
    cut(root / "training/classifier.safetensors")
    chunks = sorted(root.glob("attacked/*/*.safetensors"))
    cut(chunks[0])
    failed, said = run_again(root)
    assert failed == 0
    assert "classifier has a damaged checkpoint" in said
    assert f"damaged: {chunks[0]} is damaged" in said
    assert (root / "matrix.csv").read_bytes() == table


def test_a_full_disk_stops_the_run_and_fails_no_cell(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in root.glob("cells/*"):
        path.unlink()
    write = files.write_tensors

    def full(path: Path, *words: object) -> Path:
        if "judged" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        return write(path, *words)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            run_again(root)
    assert list(root.glob("cells/*.json")) == []
    assert run_again(root)[0] == 0


def test_a_slower_run_overwrites_no_finished_cell_with_failed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks: the other one finished, and dropped the attacked inputs, meanwhile."""
    folder = RunFolder(root)
    before = {path: path.read_bytes() for path in root.glob("cells/*")}
    folder.cell("cam", "pgd").unlink()
    make = Shards.make

    def overtaken(self: Shards, kind: str, *words: object) -> None:
        if kind == "judged":
            for path, content in before.items():
                path.write_bytes(content)
            folder.drop_chunks("attacked")
        make(self, kind, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(Shards, "make", overtaken)
    assert run_again(root)[0] == 0
    assert {path: path.read_bytes() for path in root.glob("cells/*")} == before


def test_a_word_that_would_be_a_formula_is_text(root: Path) -> None:
    assert [files.as_text(word) for word in ("=cmd|' /C calc'!A0", "-1", "pgd")] == [
        "'=cmd|' /C calc'!A0",
        "'-1",
        "pgd",
    ]


def numbers_no_json_has(path: Path) -> None:
    path.write_text('{"row": NaN, "sha256": "0"}')


def of_another_kind(path: Path) -> None:
    seals.write(path, {"hello": 1})


def of_another_run(path: Path) -> None:
    seals.write(path, {**seals.read(path), "run": "another"})


@pytest.mark.parametrize("harm", [numbers_no_json_has, of_another_kind, of_another_run])
def test_a_sealed_file_of_another_place_is_damage(harm: Callable[[Path], None], root: Path) -> None:
    """Another run's file has a checksum that fits."""
    folder = RunFolder(root)
    paths = [folder.row("cam"), folder.cell("cam", "pgd")]
    for path in paths:
        harm(path)
    found = Results.read(folder)
    assert [str(path) in why for path, why in zip(reversed(paths), found.damaged, strict=True)] == [True, True]
    assert "cam" not in found.rows
    if harm is of_another_kind:
        for name in ("weights.json", "judged.json"):
            harm(root / name)
        (folder.system("cam") / "made-of.txt").write_bytes(b"\xff\xfe")
        failed, said = run_again(root)
        assert (failed, said.count("damaged: ")) == (0, 2)
        assert Results.read(folder).damaged == ()


@pytest.mark.parametrize("harm", [numbers_no_json_has, of_another_kind])
def test_a_foreign_identity_is_named(harm: Callable[[Path], None], root: Path) -> None:
    harm(root / "run.json")
    for use in (run_again, lambda root: Results.read(RunFolder(root))):
        with pytest.raises(DamagedFileError, match=r"run.json .*restore it from a copy"):
            use(root)


def test_a_damaged_history_of_a_training_costs_no_report(root: Path) -> None:
    path = root / "training/classifier.history.json"
    before = histories(root / "training")
    for text in ("[" * 9, '{"epoch": 1}', '["x"]'):
        path.write_text(text)
        assert histories(root / "training") == before
    cut(root / "training/classifier.safetensors")
    with pytest.warns(RobustExplainWarning, match="left out: .*classifier.history.json is damaged"):
        write_report(RunFolder(root))
