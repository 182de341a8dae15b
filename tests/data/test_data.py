"""Data sets by name: disjoint, reproducible parts, honest errors, images in [0, 1]."""

from __future__ import annotations

import csv
import gzip
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

from robustexplain import data
from robustexplain.data import PARTS, arrays
from robustexplain.errors import InputError, MissingDataError, UnknownNameError
from robustexplain.registry import DATASETS


def indices(part: object) -> list[int]:
    assert isinstance(part, Subset)
    return list(part.indices)


def members(d: data.Data) -> list[list[int]]:
    return [indices(getattr(d, part)) for part in PARTS]


def write_idx(path: Path, array: np.ndarray, dimensions: int) -> None:
    content = bytes([0, 0, 8, dimensions]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for prefix, n, ending in (("train", 120, ".gz"), ("t10k", 30, "")):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{ending}", rng.integers(0, 256, (n, 28, 28), np.uint8), 3)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{ending}", np.arange(n, dtype=np.uint8) % 10, 1)
    return tmp_path


def picture(path: Path, value: int = 100, size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wide, high = size
    pixels = np.full((high, wide, 3), value, np.uint8)
    pixels[:, : wide // 2, 0] = 0
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, n in (("cat", 10), ("ant", 20), ("bee", 1)):
        for i in range(n):
            picture(tmp_path / "pictures" / name / f"{i}.png", 10 * i)
    return tmp_path / "pictures"


def table(folder: Path, rows: list[tuple[str, object]], header: tuple[str, str] = ("file", "label")) -> Path:
    folder.mkdir(exist_ok=True)
    for name, _ in rows:
        if not (folder / name).exists():
            picture(folder / name)
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits_have_an_empty_border_and_the_original_inside() -> None:
    from sklearn.datasets import load_digits

    d = data.load("digits")
    assert (d.shape, d.num_classes, d.classes[3]) == ((1, 32, 32), 10, "3")
    x, y = data.stack(d.test)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert float(x.min()) == 0.0
    assert 0.99 < float(x.max()) <= 1.0
    inner = x[:, :, 4:28, 4:28]
    assert float(x.sum()) == float(inner.sum())
    # An enlargement by 3 keeps the middle pixel of each 3x3 block.
    bunch = load_digits()
    where = indices(d.test)
    torch.testing.assert_close(inner[:, 0, 1::3, 1::3], torch.from_numpy(bunch.images[where]).float() / 16)
    assert y.tolist() == bunch.target[where].tolist()


def test_digits_size_is_an_option() -> None:
    assert data.load("digits", size=16).train[0][0].shape == (1, 16, 16)
    with pytest.raises(InputError, match="multiple of 8, got 30"):
        data.load("digits", size=30)


def test_parts_are_disjoint_complete_and_stratified() -> None:
    d = data.load("digits")
    parts = members(d)
    assert [len(p) for p in parts] == [898, 540, 359]
    assert sorted(i for part in parts for i in part) == list(range(1797))
    whole = Counter(label for part in PARTS for label in data.labels_of(getattr(d, part)))
    for part, share in zip(PARTS, (0.5, 0.3, 0.2), strict=True):
        found = Counter(data.labels_of(getattr(d, part)))
        assert all(abs(found[c] - share * whole[c]) < 2 for c in range(10))


def test_parts_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = data.load("digits", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    b, c = data.load("digits", seed=3), data.load("digits", seed=4)
    assert members(a) == members(b)
    assert a.digest == b.digest
    assert members(a) != members(c)
    assert len({a.digest, c.digest, data.load("digits", seed=3, size=16).digest}) == 3


def test_splits_of_rare_classes_are_fair() -> None:
    """A class of one sample goes anywhere with the probability of the share, not always into the same part."""
    labels = list(range(1000))
    splits = data.Splits.stratified(labels, (0.5, 0.3, 0.2), seed=0)
    assert [len(p) for p in (splits.train, splits.defense, splits.test)] == [500, 300, 200]
    assert min(splits.train) < 20
    assert max(splits.train) > 980


def test_splits_may_leave_parts_empty() -> None:
    for fractions, sizes in (((0, 0, 1), [0, 0, 9]), ((1, 0, 0), [9, 0, 0]), ((0.7, 0.3, 0.0), [6, 3, 0])):
        splits = data.Splits.stratified([0, 1, 2] * 3, fractions, seed=0)
        assert [len(p) for p in (splits.train, splits.defense, splits.test)] == sizes
    hashed = data.Splits.hashed([str(i) for i in range(200)], (0, 0, 1), 0)
    assert hashed.test == tuple(range(200))
    assert not data.Splits.hashed([str(i) for i in range(200)], (0.4, 0.6, 0), 0).test


@pytest.mark.parametrize("bad", [(0.5, 0.3, 0.3), (0.5, 0.5), (1.2, -0.4, 0.2)])
def test_fractions_must_sum_to_one(bad: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="sum to 1"):
        data.load("digits", fractions=bad)


# Take, stack ----------------------------------------------------------------------------------------------------------


def test_take_is_balanced_nested_and_reproducible() -> None:
    dataset = data.load("digits").test
    fifty = data.take(dataset, 50, seed=1)
    assert set(Counter(data.labels_of(fifty)).values()) == {5}
    assert list(data.take(dataset, 50, seed=1).indices) == list(fifty.indices)
    assert list(data.take(dataset, 20, seed=1).indices) == list(fifty.indices)[:20]
    assert list(data.take(dataset, 50, seed=2).indices) != list(fifty.indices)
    assert data.labels_of(fifty)[:10] != sorted(data.labels_of(fifty)[:10])
    with pytest.raises(InputError, match="cannot take 360 samples of a data set of 359"):
        data.take(dataset, 360)


def test_stack_keeps_the_order_asked_for() -> None:
    dataset = data.load("digits").test
    x, y = data.stack(dataset, [5, 2])
    assert torch.equal(x[0], dataset[5][0])
    assert y.tolist() == [dataset[5][1], dataset[2][1]]
    with pytest.raises(InputError, match="nothing to stack"):
        data.stack(dataset, [])


def test_labels_of_any_dataset() -> None:
    plain = TensorDataset(torch.rand(3, 1, 2, 2), torch.tensor([2, 0, 1]))
    assert data.labels_of(Subset(plain, [2, 0])) == [1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kept", [["a", "b"], [0, 1], {0: "a", 1: "b"}, torch.rand(8), np.zeros((8, 2), dtype=int), ["0"] * 8]
)
def test_an_attribute_that_holds_no_label_of_each_sample_is_not_believed(kept: object) -> None:
    class Own:
        """Its classes' names are kept where labels often are."""

        def __init__(self, labels: object) -> None:
            self.labels = labels

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(1, 2, 2), index % 2

    assert data.labels_of(Own(kept)) == [0, 1] * 4
    assert len(data.take(Own(kept), 6)) == 6
    for labels in ([3] * 8, np.full(8, 3), torch.full((8,), 3)):
        assert data.labels_of(Own(labels)) == [3] * 8


def test_parts_go_through_a_loader_with_workers(folder: Path) -> None:
    d = data.load("image-folder", path=str(folder), size=8, fractions=(0, 0, 1))
    assert len(pickle.dumps(d.test)) > 0
    batches = list(DataLoader(d.test, batch_size=16))
    assert [list(x.shape) for x, _ in batches] == [[16, 3, 8, 8], [15, 3, 8, 8]]
    assert torch.equal(torch.cat([y for _, y in batches]), data.stack(d.test)[1])


# Fashion-MNIST, CIFAR-10, Imagenette ----------------------------------------------------------------------------------


def test_fashion_mnist_reads_idx_files_plain_and_compressed(fashion: Path) -> None:
    d = data.load("fashion-mnist", root=fashion)
    assert (d.shape, d.num_classes, d.classes[9]) == ((1, 28, 28), 10, "Ankle boot")
    train, defense = indices(d.train), indices(d.defense)
    assert (len(train), len(defense), len(d.test)) == (100, 20, 30)  # type: ignore[arg-type]
    assert sorted(train + defense) == list(range(120))
    assert all(9 <= n <= 11 for n in Counter(data.labels_of(d.train)).values())
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (120, 28, 28), np.uint8)).float() / 255
    x, y = data.stack(d.train)
    assert torch.equal(x[:, 0], pixels[train])
    assert y.tolist() == [i % 10 for i in train]


def test_fashion_mnist_is_found_where_torchvision_puts_it(fashion: Path) -> None:
    raw = fashion / "elsewhere" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in fashion.glob("*ubyte*"):
        file.rename(raw / file.name)
    assert data.load("fashion-mnist", root=fashion / "elsewhere", size=14).test[0][0].shape == (1, 14, 14)


def test_digest_sees_a_single_pixel(fashion: Path) -> None:
    before = data.load("fashion-mnist", root=fashion).digest
    path = fashion / "t10k-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert data.load("fashion-mnist", root=fashion).digest != before


def test_broken_idx_files_are_named(fashion: Path) -> None:
    path = fashion / "t10k-images-idx3-ubyte"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte is cut short"):
        data.load("fashion-mnist", root=fashion)
    path.write_bytes(b"\0\0\x0d\x03" + good[4:])
    with pytest.raises(InputError, match="not an idx file"):
        data.load("fashion-mnist", root=fashion)
    path.write_bytes(good)
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"cannot read .*train-images"):
        data.load("fashion-mnist", root=fashion)


def test_labels_out_of_range_are_refused(fashion: Path) -> None:
    write_idx(fashion / "t10k-labels-idx1-ubyte", np.full(30, 10, np.uint8), 1)
    with pytest.raises(InputError, match="test part: sample 0 has label 10"):
        data.load("fashion-mnist", root=fashion)
    write_idx(fashion / "t10k-labels-idx1-ubyte", np.zeros(29, np.uint8), 1)
    with pytest.raises(InputError, match="30 images but 29 labels"):
        data.load("fashion-mnist", root=fashion)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("fashion-mnist", "apt-get install dataset-fashion-mnist"),
        ("fashion-mnist", "download: true"),
        ("cifar10", "download: true"),
        ("imagenette", "download: true"),
    ],
)
def test_missing_data_say_how_to_get_them(tmp_path: Path, name: str, advice: str) -> None:
    with pytest.raises(MissingDataError, match=advice):
        data.load(name, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


class TinyCIFAR:
    """Stands in for torchvision's loader: what it gives, without the published files."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        n = 50 if train else 10
        self.data = np.arange(n * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(n, 32, 32, 3)
        self.targets = [i % 10 for i in range(n)]


def test_cifar10_puts_channels_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", TinyCIFAR)
    d = data.load("cifar10", root=tmp_path)
    assert d.shape == (3, 32, 32)
    assert (len(indices(d.train)), len(indices(d.defense)), len(d.test)) == (40, 10, 10)  # type: ignore[arg-type]
    expected = TinyCIFAR("", False, False).data[4].transpose(2, 0, 1).astype(np.float32) / 255
    np.testing.assert_allclose(d.test[4][0].numpy(), expected)


def test_imagenette_judges_on_the_official_validation_part(tmp_path: Path) -> None:
    wnids = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
    wnids += ["n03394916", "n03417042", "n03425413", "n03445777", "n03888257"]
    for part, n in (("train", 4), ("val", 2)):
        for wnid in wnids:
            for i in range(n):
                picture(tmp_path / "imagenette2-160" / part / wnid / f"{i}.JPEG", size=(30, 20))
    d = data.load("imagenette", root=tmp_path, variant="160px", size=16, defense_share=0.25)
    assert (d.classes[0], d.num_classes, d.shape) == ("tench", 10, (3, 16, 16))
    assert (len(indices(d.train)), len(indices(d.defense)), len(d.test)) == (30, 10, 20)  # type: ignore[arg-type]
    assert data.labels_of(d.test) == [c for c in range(10) for _ in range(2)]


# Folders --------------------------------------------------------------------------------------------------------------


def test_image_folder_crops_the_centre_like_torchvision(folder: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    d = data.load(f"image-folder:{folder}", size=6, fractions=(0, 0, 1))
    assert d.name == "image-folder:pictures"
    assert d.classes == ("ant", "bee", "cat")
    x, label = d.test[12]
    path = sorted((folder / "ant").iterdir())[12]
    reference = Compose([Resize(6, InterpolationMode.BICUBIC), CenterCrop(6), ToTensor()])
    torch.testing.assert_close(x, reference(Image.open(path)))
    assert label == 0
    assert x.is_contiguous()


def test_squash_keeps_the_whole_image(tmp_path: Path) -> None:
    pixels = np.zeros((10, 40), np.uint8)
    pixels[:, -8:] = 255
    folder = table(tmp_path / "f", [("a.png", 0)])
    Image.fromarray(pixels).save(folder / "a.png")
    options: dict[str, Any] = {"path": str(folder), "size": 10, "fractions": (0, 0, 1), "channels": 1}
    squashed, cropped = (data.load("csv-folder", resize=r, **options).test[0][0] for r in ("squash", "crop"))
    assert squashed.shape == cropped.shape == (1, 10, 10)
    assert float(squashed[..., -1].min()) > 0.9
    assert float(cropped.max()) == 0.0


def test_image_folder_splits_by_class_and_has_a_digest(folder: Path) -> None:
    a, b = (data.load("image-folder", path=str(folder), size=8, seed=s) for s in (0, 1))
    parts = members(a)
    assert sorted(i for part in parts for i in part) == list(range(31))
    assert members(data.load("image-folder", path=str(folder), size=8)) == parts
    assert data.load("image-folder", path=str(folder), size=8).digest == a.digest != b.digest
    (folder / "cat" / "3.png").rename(folder / "cat" / "x.png")
    assert data.load("image-folder", path=str(folder), size=8).digest != a.digest


def test_image_folder_refuses_parts_taken_for_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        picture(tmp_path / part / "cat" / "1.png")
    with pytest.raises(InputError, match="parts, not classes"):
        data.load("image-folder", path=str(tmp_path))


def test_a_broken_image_is_named(folder: Path) -> None:
    good = (folder / "ant" / "0.png").read_bytes()
    (folder / "ant" / "0.png").write_bytes(good[:-30])
    (folder / "ant" / "1.png").write_text("no image")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "ant" / "10.png")
    test = data.load("image-folder", path=str(folder), size=8, fractions=(0, 0, 1)).test
    for index, name in ((0, "0.png"), (1, "1.png"), (2, "10.png")):
        with pytest.raises(InputError, match=rf"cannot read the image .*ant/{name}"):
            test[index]


def test_csv_folder_reads_labels_and_names(tmp_path: Path) -> None:
    folder = table(tmp_path / "f", [("a.png", 2), ("b.png", 0)])
    d = data.load(f"csv-folder:{folder}", size=8, fractions=(0, 0, 1), num_classes=1000)
    assert (d.num_classes, d.classes[999], d.shape) == (1000, "999", (3, 8, 8))
    assert data.labels_of(d.test) == [2, 0]
    named = data.load(f"csv-folder:{folder}", classes=("x", "y", "z"))
    assert named.classes == ("x", "y", "z")
    assert data.load(f"csv-folder:{folder}").num_classes == 3


def test_csv_folder_takes_names_of_classes_for_labels(tmp_path: Path) -> None:
    folder = table(tmp_path / "f", [("a.png", "dog"), ("b.png", "cat"), ("c.png", "dog")])
    d = data.load(f"csv-folder:{folder}", size=8, fractions=(0, 0, 1))
    assert d.classes == ("cat", "dog")
    assert data.labels_of(d.test) == [1, 0, 1]
    given = data.load(f"csv-folder:{folder}", size=8, fractions=(0, 0, 1), classes=("dog", "cow", "cat"))
    assert (given.num_classes, data.labels_of(given.test)) == (3, [0, 2, 0])


def test_csv_folder_members_stay_when_rows_come_and_go(tmp_path: Path) -> None:
    rows: list[tuple[str, object]] = [(f"{i}.png", i % 3) for i in range(60)]
    folder = table(tmp_path / "f", rows)

    def by_part() -> dict[str, str]:
        d = data.load(f"csv-folder:{folder}", size=8, num_classes=3)
        return {d.train.dataset.names[i]: part for part in PARTS for i in indices(getattr(d, part))}  # type: ignore[attr-defined]

    before = by_part()
    assert len(before) == 60
    assert min(Counter(before.values()).values()) > 3
    table(folder, [("new.png", 1), *reversed(rows[5:])])
    after = by_part()
    assert all(after[name] == before[name] for name, _ in rows[5:])


def test_csv_folder_takes_its_parts_from_a_column(tmp_path: Path) -> None:
    folder = table(tmp_path / "f", [(f"{i}.png", i % 3) for i in range(7)])
    parts = ["test", "train", "train", "defense", "test", "defense", "train"]
    lines = [f"{i}.png,{i % 3},{part}" for i, part in enumerate(parts)]
    (folder / "labels.csv").write_text("\n".join(["file,label,part", *lines]))
    d = data.load(f"csv-folder:{folder}", size=8, part_column="part", seed=3)
    assert [list(indices(getattr(d, part))) for part in PARTS] == [[1, 2, 6], [3, 5], [0, 4]]
    assert data.labels_of(d.defense) == [0, 2]
    other = data.load(f"csv-folder:{folder}", size=8)
    assert other.digest != d.digest
    (folder / "labels.csv").write_text("\n".join(["file,label,part", *lines, "x.png,0,judge"]))
    with pytest.raises(InputError, match=r"line 9: part must be one of .* got 'judge'; it is called 'test' now"):
        data.load(f"csv-folder:{folder}", part_column="part")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([("a.png", 5)], {"num_classes": 5}, "label 5, but the classes are 0 to 4"),
        ([("a.png", -1)], {"num_classes": 5}, "label -1"),
        ([("a.png", 1), ("b.png", "cat")], {}, "line 3: label must be an integer, as on other lines, got 'cat'"),
        ([("a.png", "cat")], {"classes": ("dog", "cow")}, "line 2: label must be one of dog, cow, got 'cat'"),
        ([("a.png", "cat"), ("b.png", "")], {}, "line 3: label must be one of , cat, got ''"),
        ([("a.png", "cat")], {"num_classes": 2}, "num_classes is 2, but there are 1 classes"),
        ([("a.png", 0), ("a.png", 1)], {}, "names a file twice"),
        ([], {}, "has no rows"),
        ([("a.png", 0)], {"label_column": "y"}, "no column 'y'"),
        ([("a.png", 0)], {"part_column": "part"}, "no column 'part'"),
        ([("a.png", 0)], {"classes": ("x",), "num_classes": 2}, "num_classes is 2"),
        ([("a.png", 0)], {"resize": "stretch"}, "resize must be one of"),
        ([("a.png", 0)], {"channels": 2}, "channels must be one of"),
        ([("a.png", 0)], {"num_classes": 0}, "num_classes must be at least 1, or None"),
    ],
)
def test_csv_folder_refuses(
    tmp_path: Path, rows: list[tuple[str, object]], options: dict[str, Any], message: str
) -> None:
    folder = table(tmp_path / "f", rows)
    with pytest.raises(InputError, match=message):
        data.load("csv-folder", path=str(folder), **options)


def test_csv_folder_names_what_is_missing(tmp_path: Path) -> None:
    folder = table(tmp_path / "f", [("a.png", 0)])
    (folder / "a.png").unlink()
    with pytest.raises(MissingDataError, match=r"'a\.png', which is not in"):
        data.load(f"csv-folder:{folder}")
    (folder / "labels.csv").unlink()
    with pytest.raises(MissingDataError, match=r"no file .*labels\.csv"):
        data.load(f"csv-folder:{folder}")
    with pytest.raises(MissingDataError, match="no folder"):
        data.load("image-folder:nowhere")


# Names ----------------------------------------------------------------------------------------------------------------


def test_unknown_names_and_options() -> None:
    with pytest.raises(UnknownNameError, match="fashion-mnist"):
        data.load("fashionmnist")
    with pytest.raises(InputError, match="'digits' has no option root"):
        data.load("digits", root="x")
    with pytest.raises(InputError, match="needs path"):
        data.load("image-folder")
    with pytest.raises(InputError, match=r"Digits\.seed must be at least 0"):
        data.load("digits", seed=-1)
    with pytest.raises(InputError, match=r"FashionMNIST\.size must be at least 1"):
        arrays.FashionMNIST(size=0)


def test_every_data_set_is_listed_and_its_fields_make_a_schema() -> None:
    """A recipe's schema reads the fields: pydantic must understand them, and know their bounds."""
    from pydantic import TypeAdapter, ValidationError

    names = {"digits", "fashion-mnist", "cifar10", "imagenette", "image-folder", "csv-folder"}
    entries = {entry.name: entry for entry in DATASETS}
    assert names <= set(entries)
    for name in names:
        assert entries[name].summary
        required = {"path": "x"} if "folder" in name else {}
        adapter: TypeAdapter[Any] = TypeAdapter(entries[name].build)  # type: ignore[arg-type]
        assert adapter.validate_python({"seed": 3, **required}).seed == 3
        with pytest.raises(ValidationError):
            adapter.validate_python({"size": 0, **required})
