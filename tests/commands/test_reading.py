"""The commands read images as the data sets do, and say before training what cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustexplain import files
from robustexplain.cli import main
from robustexplain.evaluation import RunFolder
from robustexplain.recipe import check_data, read

RECIPE = """
data: {{{data}}}
model: {{name: small-cnn, train: {{epochs: 1}}}}
interpreters: [gradient]
attacks: [{{name: noise, eps: 1/255}}]
evaluation: {{images: 4}}
"""


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["robustexplain", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0), capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.jpg")
    return tmp_path / "images"


@pytest.mark.parametrize("verb", ["explain", "attack"])
@pytest.mark.parametrize("form", ["grey of 16 bits", "several frames", "cut short"])
def test_an_image_that_would_be_read_wrongly_ends_the_command_with_a_line(
    verb: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    if form == "grey of 16 bits":
        Image.new("I;16", (64, 64)).save("x.png")
    elif form == "several frames":
        picture.save("x.png", save_all=True, append_images=[picture.rotate(90)])
    else:
        picture.save("x.png")
        Path("x.png").write_bytes(Path("x.png").read_bytes()[:-200])
    code, error = said(capsys, monkeypatch, verb, "x.png", "--model", "small-cnn")
    assert code == 2
    assert error.startswith("error: cannot read the image 'x.png': ")
    assert error.count("\n") == 1


def test_validate_names_images_that_cannot_be_read_and_files_outside_of_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(data=f"name: image-folder, path: {folder}, size: 32"))
    (folder / "cat" / "3.jpg").write_bytes((folder / "cat" / "4.jpg").read_bytes()[:-40])
    code, error = said(capsys, monkeypatch, "validate", recipe)
    assert code == 2
    assert "data: cannot read the image" in error
    assert "cat/3.jpg': image file is truncated" in error
    (folder / "labels.csv").write_text("file,label\n../../../../../../etc/passwd,0\n")
    recipe.write_text(RECIPE.format(data=f"name: csv-folder, path: {folder}, size: 32"))
    code, error = said(capsys, monkeypatch, "validate", recipe)
    assert code == 2
    assert "line 2 must name a file below" in error


def test_a_run_directory_is_not_gone_on_with_where_images_of_the_same_size_are_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in folder.rglob("*.jpg"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
        path.unlink()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(data=f"name: image-folder, path: {folder}, size: 32"))
    experiment = read(str(recipe), [])
    data = check_data(experiment)
    RunFolder(tmp_path / "run").open(experiment, data.digest, data.features, data.shape, "no")
    files.write_json(tmp_path / "run" / "cells" / "made.json", {})  # work that would be lost
    for path in folder.rglob("*.bmp"):
        content = path.read_bytes()
        path.write_bytes(content[:54] + bytes(255 - byte for byte in content[54:]))
    code, error = said(capsys, monkeypatch, "run", recipe, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 2
    assert "its data differs" in error
