"""Data sets of image files, decoded one by one when accessed."""

from __future__ import annotations

import csv as csv_format
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch.utils.data import Dataset, Subset

from ..errors import InputError, MissingDataError
from ..fields import Count, Fraction, Natural, check_fields
from ..registry import DATASETS
from ..renamed import PARTS as RENAMED_PARTS
from ..renamed import renamed
from .arrays import default_root
from .base import PARTS, Data, Digest, Item, Splits, at_least_one, checked_fractions, checked_labels, one_of
from .inputs import Resize, decoded

_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Files(Dataset[Item]):
    """Image files and their labels; an image is decoded when accessed.

    Args:
        folder: where the files are.
        names: the files, relative to ``folder``.
        labels: a class a file.
        size: side of the square that comes out (bicubic).
        resize: ``"crop"`` scales the shorter side to ``size`` and cuts the centre out; ``"squash"`` keeps the whole
            image and changes its proportions.
        channels: 3 for colour, 1 for grey.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], labels: Sequence[int], size: int, resize: Resize, channels: int
    ) -> None:
        self.folder = folder
        self.names = list(names)
        self.labels = list(labels)
        self.size, self.resize, self.channels = size, resize, channels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        path = self.folder / self.names[index]
        return decoded(path, (self.size, self.size), self.resize, self.channels), self.labels[index]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an item."""
        return self.channels, self.size, self.size

    def fingerprint(self) -> Digest:
        """A digest of names, sizes in bytes and labels, and of how images are resized; contents are not read."""
        digest = Digest(self.shape, self.resize)
        for name, label in zip(self.names, self.labels, strict=True):
            digest.add(name, (self.folder / name).stat().st_size, label)
        return digest


def _check(component: Any) -> None:
    check_fields(component)
    at_least_one(component, "size")
    for field, allowed in (("resize", ("squash", "crop")), ("channels", (1, 3))):
        if hasattr(component, field):
            one_of(component, field, allowed)
    if hasattr(component, "fractions"):
        checked_fractions(component.fractions)


def _folder(path: str, name: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MissingDataError(f"{name}: no folder {str(folder)!r}; set path to the folder of your images")
    return folder


def _scan(folder: Path) -> tuple[list[str], list[int], list[str]]:
    """Files, labels and class names, by torchvision's ImageFolder: a class is a subfolder, in sorted order."""
    from torchvision.datasets import ImageFolder as Torchvision

    try:
        found = Torchvision(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"{str(folder)!r} is no image folder (a subfolder with images a class): {error}") from error
    names = [Path(path).relative_to(folder).as_posix() for path, _ in found.samples]
    return names, list(found.targets), list(found.classes)


@DATASETS.register("image-folder")
@dataclass(frozen=True)
class ImageFolder:
    """Your own images: a folder a class, names sorted (torchvision's ImageFolder). Also written ``image-folder:PATH``.

    Splits are stratified. The digest covers names, sizes and labels, not the contents of files.

    Args:
        path: the folder above the classes' folders.
        seed: of the split.
        size: side in pixels; the shorter side is scaled to it and the centre cut out, unless ``resize`` says else.
        resize: ``"crop"`` or ``"squash"`` (whole image, proportions changed).
        channels: 3 for colour, 1 for grey.
        fractions: shares of train, defense and test; ``(0, 0, 1)`` for a folder that is only judged on.
    """

    path: str
    seed: Natural = 0
    size: Count = 224
    resize: Literal["crop", "squash"] = "crop"
    channels: Literal[1, 3] = 3
    fractions: tuple[float, float, float] = (0.5, 0.3, 0.2)

    def __post_init__(self) -> None:
        _check(self)

    def load(self) -> Data:
        """List the files.

        Raises:
            MissingDataError: if there is no such folder.
            InputError: if it does not hold a folder with images for each class.
        """
        folder = _folder(self.path, "image-folder")
        names, labels, classes = _scan(folder)
        if len(classes) > 1 and {c.lower() for c in classes} <= _PARTS:
            raise InputError(f"{str(folder)!r} holds parts, not classes: {classes}. Set path to one of them")
        dataset = Files(folder, names, labels, self.size, self.resize, self.channels)
        splits = Splits.stratified(labels, self.fractions, self.seed)
        digest = dataset.fingerprint().add(classes, splits)
        name = f"image-folder:{folder.resolve().name}"
        parts = splits.of(dataset)
        return Data(name, tuple(classes), dataset.shape, *parts, digest.hex(), resize=self.resize)


class _FileRow(NamedTuple):
    """A line of the CSV file; ``part`` is ``None`` without a column of parts."""

    file: str
    label: str
    part: str | None
    where: str


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


@DATASETS.register("csv-folder")
@dataclass(frozen=True)
class CsvFolder:
    """Your own images: a folder, and a CSV file with a row an image that names the file and its class.

    Who goes into which part is decided by a hash of the file's name, so that parts stay when rows come or go, or by a
    column of the file.

    Args:
        path: the folder of the images.
        csv: the CSV file, relative to ``path``, with a header row.
        file_column: the column of file names, relative to ``path``.
        label_column: the column of labels: numbers from 0 to ``num_classes - 1``, or names of classes.
        part_column: the column that says ``train``, ``defense`` or ``test``, for a split that was published or that
            keeps relatives (crops of a photograph, images of a patient) together; ``seed`` and ``fractions`` have
            no say then.
        classes: names of the classes, in the order of the labels; default their numbers, or the names that stand
            there, sorted.
        num_classes: default as many as there are names, else the largest label plus 1.
        seed: of the split.
        size: side in pixels.
        resize: ``"squash"`` (whole image, proportions changed) or ``"crop"``.
        channels: 3 for colour, 1 for grey.
        fractions: expected shares of train, defense and test; ``(0, 0, 1)`` for a folder that is only judged on.
    """

    path: str
    csv: str = "labels.csv"
    file_column: str = "file"
    label_column: str = "label"
    part_column: str | None = None
    classes: tuple[str, ...] | None = None
    num_classes: Count | None = None
    seed: Natural = 0
    size: Count = 224
    resize: Literal["squash", "crop"] = "squash"
    channels: Literal[1, 3] = 3
    fractions: tuple[float, float, float] = (0.5, 0.3, 0.2)

    def __post_init__(self) -> None:
        _check(self)
        at_least_one(self, "num_classes")
        if self.classes and self.num_classes not in (None, len(self.classes)):
            raise InputError(f"CsvFolder: num_classes is {self.num_classes}, but there are {len(self.classes)} classes")

    def load(self) -> Data:
        """Read the CSV file and list the images.

        Raises:
            MissingDataError: if the folder, the CSV file or an image is not there.
            InputError: for a missing column, a file named twice, or a label that is no class.
        """
        folder = _folder(self.path, "csv-folder")
        rows = self._rows(folder / self.csv)
        names = [row.file for row in rows]
        for name in names:
            if not (folder / name).is_file():
                raise MissingDataError(f"csv-folder: {self.csv} names {name!r}, which is not in {str(folder)!r}")
        labels, classes = self._labels(rows)
        checked_labels(labels, len(classes), str(folder / self.csv))
        dataset = Files(folder, names, labels, self.size, self.resize, self.channels)
        if self.part_column is None:
            splits = Splits.hashed(names, self.fractions, self.seed)
        else:
            splits = Splits.named([row.part for row in rows])
        digest = dataset.fingerprint().add(classes, splits)
        name, parts = f"csv-folder:{folder.resolve().name}", splits.of(dataset)
        return Data(name, classes, dataset.shape, *parts, digest.hex(), resize=self.resize)

    def _rows(self, path: Path) -> list[_FileRow]:
        if not path.is_file():
            raise MissingDataError(f"csv-folder: no file {str(path)!r}; set csv to the file with the labels")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_format.DictReader(file)
            for column in filter(None, (self.file_column, self.label_column, self.part_column)):
                if column not in (reader.fieldnames or ()):
                    raise InputError(f"{str(path)!r} has no column {column!r}; it has {reader.fieldnames}")
            rows = [self._row(row, f"{str(path)!r}, line {reader.line_num}") for row in reader]
        if not rows or len({row.file for row in rows}) < len(rows):
            raise InputError(f"{str(path)!r} " + ("names a file twice" if rows else "has no rows"))
        return rows

    def _row(self, row: dict[str, str], where: str) -> _FileRow:
        part = row[self.part_column] if self.part_column else None
        if self.part_column and part not in PARTS:
            hint = renamed(part, RENAMED_PARTS)
            raise InputError(f"{where}: {self.part_column} must be one of {', '.join(PARTS)}, got {part!r}{hint}")
        return _FileRow(row[self.file_column] or "", (row[self.label_column] or "").strip(), part, where)

    def _labels(self, rows: list[_FileRow]) -> tuple[list[int], tuple[str, ...]]:
        """The class of each row, by number, and the names of the classes."""
        numbers = [_number(row.label) for row in rows]
        if any(number is not None for number in numbers):
            # One number among names, or the other way round, is a slip.
            for row, number in zip(rows, numbers, strict=True):
                if number is None:
                    raise InputError(f"{row.where}: label must be an integer, as on other lines, got {row.label!r}")
            labels = [number for number in numbers if number is not None]
            count = self.num_classes or len(self.classes or ()) or max(labels) + 1
            return labels, tuple(self.classes or map(str, range(count)))
        classes = tuple(self.classes or sorted({row.label for row in rows}))
        for row in rows:
            if row.label not in classes or not row.label:
                raise InputError(f"{row.where}: label must be one of {', '.join(classes)}, got {row.label!r}")
        if self.num_classes not in (None, len(classes)):
            raise InputError(f"CsvFolder: num_classes is {self.num_classes}, but there are {len(classes)} classes")
        return [classes.index(row.label) for row in rows], classes


@DATASETS.register("imagenette", paper="Howard 2019, a subset of ImageNet")
@dataclass(frozen=True)
class Imagenette:
    """About 13,400 photographs of ten distinct classes of ImageNet; evaluated on the official validation part.

    Args:
        seed: of the split of the official train part.
        root: torchvision's root, the folder above ``imagenette2*``. Default: the user's cache folder.
        size: side in pixels; the shorter side is scaled to it and the centre cut out.
        variant: which of the published sizes to read.
        download: let torchvision download it into ``root``.
        defense_share: the share of the official train part that is for defenses.
    """

    seed: Natural = 0
    root: str | None = None
    size: Count = 160
    variant: Literal["160px", "320px", "full"] = "320px"
    download: bool = False
    defense_share: Fraction = 0.2

    def __post_init__(self) -> None:
        _check(self)
        one_of(self, "variant", ("160px", "320px", "full"))

    def load(self) -> Data:
        """List the files.

        Raises:
            MissingDataError: if they are not there.
        """
        folder, classes = self._fetch()
        train, test = self._part(folder / "train"), self._part(folder / "val")
        splits = Splits.stratified(train.labels, (1 - self.defense_share, self.defense_share, 0.0), self.seed)
        digest = train.fingerprint().add(test.fingerprint().hex(), classes, splits)
        parts = Subset(train, splits.train), Subset(train, splits.defense)
        return Data("imagenette", classes, train.shape, *parts, test, digest.hex(), resize="crop")

    def _fetch(self) -> tuple[Path, tuple[str, ...]]:
        from torchvision.datasets import Imagenette as Torchvision

        root = Path(self.root).expanduser() if self.root else default_root()
        folder = root / ("imagenette2" if self.variant == "full" else f"imagenette2-{self.variant[:3]}")
        try:
            # torchvision refuses to download over a folder that is there.
            found = Torchvision(str(root), size=self.variant, download=self.download and not folder.is_dir())
        except (OSError, RuntimeError) as error:
            raise MissingDataError(
                f"imagenette: not in {root} ({error}). Set download: true; or set root to the folder that holds "
                f"{folder.name}, from https://github.com/fastai/imagenette"
            ) from error
        return folder, tuple(names[0] for names in found.classes)

    def _part(self, folder: Path) -> Files:
        names, labels, _ = _scan(folder)
        return Files(folder, names, labels, self.size, "crop", 3)
