"""Folders of images: what is left out is said, what is no data set is refused, the digest covers contents."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustexplain import data
from robustexplain.data import Data, contents, findings
from robustexplain.data.listing import listed
from robustexplain.errors import DataWarning, InputError, MissingDataError


def make(root: Path, counts: dict[str, int], ending: str = ".png") -> Path:
    rng = np.random.default_rng(len(counts))
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}{ending}")
    return root


def load(root: Path, **options: object) -> Data:
    return data.load(f"image-folder:{root}", **{"size": 8, **options})  # type: ignore[arg-type]


def test_hidden_files_and_those_of_systems_are_left_out_with_one_warning(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"cat": 10, "dog": 10})
    plain = load(root)
    make(root, {".ipynb_checkpoints": 2, "__MACOSX": 1, "cat/@eaDir": 1, "dog/.thumbs": 3})
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/._0.png", "notes.txt", "dog/notes.txt"):
        (root / name).write_text("x")
    with pytest.warns(DataWarning) as said:
        loaded = load(root)
    assert (loaded.classes, loaded.digest) == (plain.classes, plain.digest)
    words = "left out 8 hidden or system entries (.DS_Store 2, "
    assert words in str(said[0].message)
    assert "1 files that are no images by their ending (.txt); 1 files beside" in str(said[0].message)
    assert len(said) == 1


def test_endings_count_in_capitals_and_files_keep_torchvisions_order(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = make(make(tmp_path / "a", {"b": 3, "a": 2, "a/z": 2, "a/Z/y": 1}), {"b": 12}, ".JPG")
    found = load(root, fractions=(0, 0, 1)).test.dataset  # type: ignore[attr-defined]
    expected = ImageFolder(str(root)).samples
    assert [(str(root / n), label) for n, label in zip(found.names, found.labels, strict=True)] == expected


def test_links_that_lead_upwards_end(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"cat": 10, "dog": 10})
    (root / "cat" / "again").symlink_to(root / "cat")
    assert len(load(root, fractions=(0, 0, 1)).test) == 20
    (root / "dog").rename(tmp_path / "elsewhere")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    assert load(root).classes == ("cat", "dog")


@pytest.mark.parametrize("parts", [("train",), ("train", "val"), ("TRAIN", "Test", "dev"), ("train", "annotations")])
def test_a_folder_above_the_parts_is_refused_with_the_way_down(parts: tuple[str, ...], tmp_path: Path) -> None:
    for part in parts:
        make(tmp_path / part, {"cat": 1, "dog": 1} if part != "annotations" else {"": 1})
    with pytest.raises(InputError, match=rf"holds parts, not classes: .*Set path to one of them, such as .*{parts[0]}"):
        load(tmp_path)


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    assert load(make(tmp_path, {"test": 10, "control": 10})).classes == ("control", "test")


@pytest.mark.parametrize(
    "counts,words",
    [
        ({"cat": 3}, "it holds one class, 'cat', and at least two are needed"),
        ({}, "it holds no folder of a class"),
        ({"cat": 3, "dog": 0}, "the folder of class 'dog' holds no image"),
        ({".hidden": 3}, "it holds no folder of a class"),
    ],
)
def test_what_is_no_data_set_of_classes_is_refused(counts: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        load(make(tmp_path, counts))


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"cat": 3, "dog": 3})
    (root / "cat" / "gone.png").symlink_to("/nonexistent.png")
    with pytest.raises(InputError, match=r"cat/gone\.png' is a link to nothing"):
        load(root)


def test_classes_missing_from_a_part_and_copies_across_parts_are_warned_of(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"cat": 6, "dog": 6, "yak": 1})
    with pytest.warns(DataWarning, match="part has none of 'yak'") as said:
        load(root)
    assert len(said) == 1
    for i in range(6):
        shutil.copy(root / "cat" / "0.png", root / "cat" / f"copy{i}.png")
    with pytest.warns(DataWarning, match=r"\d of 4 images of the test part are in the train or defense part too"):
        load(root)
    rows = "".join(f"cat/{i}.png,{i % 2}\n" for i in range(6))
    (root / "labels.csv").write_text("file,label\n" + rows)
    with pytest.warns(DataWarning, match="no part has a sample of '2'"):
        data.load(f"csv-folder:{root}", num_classes=3, fractions=(0.9, 0, 0.1))


def test_classes_named_by_numbers_in_another_order_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"cat": 6, "dog": 6})
    rows = "".join(f"cat/{i}.png,{i % 2}\n" for i in range(6))
    (root / "labels.csv").write_text("file,label\n" + rows)
    with pytest.raises(InputError, match="label '0' is the name of class 1, and a number: give classes in the order"):
        data.load(f"csv-folder:{root}", classes=("1", "0"))
    assert data.load(f"csv-folder:{root}", classes=("0", "1")).classes == ("0", "1")
    (root / "labels.csv").write_text("file,label\n" + rows.replace(",1", ",1_0"))
    with pytest.raises(InputError, match="label must be an integer, as on other lines, got '1_0'"):
        data.load(f"csv-folder:{root}")


# Contents -------------------------------------------------------------------------------------------------------------


def invert(root: Path) -> None:
    for path in root.rglob("*.bmp"):
        times = path.stat()
        with Image.open(path) as image:
            pixels = 255 - np.asarray(image)
        path.write_bytes(path.read_bytes()[:54] + pixels[::-1, :, ::-1].tobytes())
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that is really read; what was found is kept in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "FEW_BYTES", 0)
    monkeypatch.setattr(contents, "SETTLED_S", 0)
    seen: list[str] = []
    monkeypatch.setattr(contents, "fault_of", lambda path, thorough: seen.append(path.name) or "")
    return seen


def test_other_pixels_of_one_size_and_time_are_other_data(tmp_path: Path, looks: list[str]) -> None:
    root = make(tmp_path / "a", {"cat": 5, "dog": 5}, ".bmp")
    rows = "".join(f"cat/{i}.bmp,{i % 2}\n" for i in range(5))
    (root / "labels.csv").write_text("file,label\n" + rows)

    def digests() -> tuple[str, str]:
        return load(root).digest, data.load(f"csv-folder:{root}").digest

    before = digests()
    assert digests() == before
    sizes = {path: path.stat().st_size for path in root.rglob("*.bmp")}
    invert(root)
    assert {path: path.stat().st_size for path in root.rglob("*.bmp")} == sizes
    now = digests()
    assert now[0] != before[0]
    assert now[1] != before[1]


def test_files_are_read_again_only_if_they_changed(tmp_path: Path, looks: list[str]) -> None:
    root = make(tmp_path / "a", {"cat": 5, "dog": 5}, ".bmp")
    before = load(root).digest
    assert len(looks) == 10
    assert load(root).digest == before
    assert len(looks) == 10
    invert(root / "cat")
    assert load(root).digest != before
    assert len(looks) == 15


@pytest.mark.parametrize("damage", ["{", "[]", '{"reader": 1}', "words"])
def test_a_damaged_cache_is_as_none(damage: str, tmp_path: Path, looks: list[str]) -> None:
    root = make(tmp_path / "a", {"cat": 5, "dog": 5}, ".bmp")
    before = load(root).digest
    (kept,) = (tmp_path / "cache" / "robustexplain" / "contents").iterdir()
    whole = json.loads(kept.read_text())
    for text in (damage, json.dumps({**whole, "files": {n: e[:5] for n, e in whole["files"].items()}})):
        kept.write_text(text)
        looks.clear()
        assert load(root).digest == before
        assert len(looks) == 10


def test_what_may_change_unseen_or_is_quickly_read_is_not_kept(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "a", {"cat": 5, "dog": 5}, ".bmp")
    monkeypatch.setattr(contents, "SETTLED_S", 60)
    load(root)
    load(root)
    assert len(looks) == 20
    monkeypatch.setattr(contents, "SETTLED_S", 0)
    monkeypatch.setattr(contents, "FEW_BYTES", 2**20)
    shutil.rmtree(tmp_path / "cache")
    load(root)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(contents, "FEW_BYTES", 0)
    (tmp_path / "cache").write_text("a file where the folder would be")
    load(root)


# CSV folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "cat/../../a/x.png", "..", ""])
def test_a_file_outside_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"file,label\n{name},0\n")
    with pytest.raises(InputError, match=rf"line 2 must name a file below .*, got {re.escape(repr(name))}"):
        data.load(f"csv-folder:{tmp_path}")


LABELS: dict[str, tuple[bytes, dict[str, str], str]] = {
    "latin-1": ("file,label\ncat/0.png,café\n".encode("latin-1"), {}, "set encoding to .* such as latin-1 or cp1252"),
    "utf-16": ("file,label\ncat/0.png,a\n".encode("utf-16"), {}, "such as utf-16"),
    "unknown encoding": (b"file,label\n", {"encoding": "utf-99"}, "CsvFolder.encoding must be one such as utf-8"),
    "semicolons": (b"file;label\ncat/0.png;a\n", {}, "has one column, 'file;label': set delimiter to ';'"),
    "long delimiter": (b"file,label\n", {"delimiter": "::"}, "CsvFolder.delimiter must be one character"),
    "two columns": (b"file,label,label\ncat/0.png,a,b\n", {}, "two columns are called 'label'"),
    "ragged": (b"file,label\ncat/0.png,a,b\n", {}, "line 2 has 3 cells, and the header 2"),
    "huge cell": (b"file,label\n" + b"x" * 200_000 + b",a\n", {}, "cannot read .* field larger than field limit"),
    "twice": (b"file,label\ncat/0.png,a\ncat/./0.png,b\n", {}, "line 3 names a file twice: .* stands in .*line 2"),
    "backslash": (b"file,label\ncat\\0.png,a\n", {}, "folders are separated by /"),
    "another column": (b"file,label\ncat/0.png,20240131123\n", {}, "at most 1000000 are possible"),
    "empty": (b"\n\n", {}, "is empty"),
}


@pytest.mark.parametrize("case", LABELS)
def test_a_file_of_labels_is_refused_by_what_is_wrong_with_it(case: str, tmp_path: Path) -> None:
    content, options, words = LABELS[case]
    make(tmp_path, {"cat": 1})
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises((InputError, MissingDataError), match=words):
        data.load(f"csv-folder:{tmp_path}", **options)  # type: ignore[arg-type]


def test_other_encodings_and_delimiters_are_read(tmp_path: Path) -> None:
    make(tmp_path, {"cat": 2})
    (tmp_path / "labels.csv").write_bytes("file;label\ncat/0.png;café\ncat/1.png;thé\n".encode("cp1252"))
    options = {"encoding": "cp1252", "delimiter": ";", "fractions": (0, 0, 1)}
    assert data.load(f"csv-folder:{tmp_path}", **options).classes == ("café", "thé")  # type: ignore[arg-type]


# Before training ------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_known_before_training(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"cat": 12, "dog": 12}, ".jpg")
    assert findings(load(root)) == []
    for i in range(11):
        path = root / "cat" / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[:-30])
    said = findings(load(root))
    assert len(said) == 9
    assert re.search(r"cannot read the image '.*cat/0\.jpg': .*truncated", said[0])
    assert "and 3 more files of image-folder:a cannot be read" in said[-1]


def test_samples_that_are_not_what_the_data_set_says_are_known_before_training() -> None:
    from dataclasses import replace

    import torch

    digits = data.load("digits", size=8)
    x, y = torch.zeros(4, 1, 8, 8), [0, 1, 2, 3]
    nan = x.clone()
    nan[1, 0, 0, 0] = torch.nan
    for images, labels, words in (
        (x[..., :4], y, r"sample 0 of the test part must be floating point \[1, 8, 8\], got torch.float32 \[1, 8, 4\]"),
        (x + 255, y, r"must lie in \[0, 1\], got values from 255 to 255"),
        (nan, y, "sample 1 of the test part holds NaN"),
        (x, [0, 1, 2, 11], "sample 3 of the test part has label 11, but the classes are 0 to 9"),
    ):
        pairs = list(zip(images, labels, strict=True))
        assert any(re.search(words, line) for line in findings(replace(digits, test=pairs)))  # type: ignore[arg-type]
    assert findings(digits) == []


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    os.mkfifo(tmp_path / "a/1.png")
    with pytest.raises(InputError, match=r"1.png' is no file"):
        load(tmp_path)


def test_a_link_to_the_folder_above_the_classes_gives_no_class_the_images_of_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    (tmp_path / "a/up").symlink_to("..")
    found = listed(tmp_path)
    assert (found.names, found.labels) == (["a/0.png", "b/0.png"], [0, 1])
    assert found.hidden.total() == 1


def test_what_was_only_looked_at_is_read_again_where_it_can_be_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger data set, of which files were kept without being decoded, shares the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "FEW_BYTES", 0)
    monkeypatch.setattr(contents, "FEW_FILES", 1)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        Image.effect_noise((64, 64), 90).save(folder / name)
    monkeypatch.setattr(contents, "SETTLED_S", -1.0)
    monkeypatch.setattr(contents, "fault_of", lambda path, thorough: "truncated" if thorough else "")
    assert [one.fault for one in contents.contents(folder, ["0.png", "1.png"])] == ["", ""]
    assert contents.contents(folder, ["0.png"])[0].fault == "truncated"
