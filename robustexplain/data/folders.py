"""Data sets of image files, decoded one by one when accessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset, Subset

from ..errors import InputError, MissingDataError
from ..fields import Count, Fraction, Natural, check_fields
from ..registry import DATASETS
from .arrays import default_root
from .base import Data, Digest, Item, Splits, checked_fractions, one_of
from .contents import Content, contents
from .findings import warn_of_classes, warn_of_copies
from .listing import listed
from .pictures import MOST_SIDE, Resize, decoded


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

    Attributes:
        faults: why files cannot be read, by name, as far as :meth:`looked` saw; they are refused when accessed.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], labels: Sequence[int], size: int, resize: Resize, channels: int
    ) -> None:
        self.folder = folder
        self.names = list(names)
        self.labels = list(labels)
        self.size, self.resize, self.channels = size, resize, channels
        self.faults: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        path = self.folder / self.names[index]
        return decoded(path, (self.size, self.size), self.resize, self.channels), self.labels[index]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an item."""
        return self.channels, self.size, self.size

    def looked(self) -> list[Content]:
        """What each file holds; notes in ``faults`` which cannot be read.

        Raises:
            InputError: a file that is not there or may not be read.
        """
        found = contents(self.folder, self.names)
        self.faults = {name: one.fault for name, one in zip(self.names, found, strict=True) if one.fault}
        return found

    def fingerprint(self, looked: Sequence[Content]) -> Digest:
        """A digest of names, contents and labels, and of how images are resized."""
        digest = Digest(self.shape, self.resize)
        for name, label, one in zip(self.names, self.labels, looked, strict=True):
            digest.add(name, one.sha256, label)
        return digest


def of_files(name: str, classes: Sequence[str], files: Files, splits: Splits) -> Data:
    """A data set of image files in three parts; what looks wrong with it is a warning."""
    looked = files.looked()
    digest = files.fingerprint(looked).add(tuple(classes), splits)
    data = Data(name, tuple(classes), files.shape, *splits.of(files), digest.hex(), resize=files.resize)
    warn_of_classes(data)
    warn_of_copies(name, files.names, [one.sha256 for one in looked], splits)
    return data


def check_images(component: Any) -> None:
    """Refuse fields of a data set of image files that are out of range.

    Raises:
        InputError: naming the field and the value.
    """
    check_fields(component)
    if component.size > MOST_SIDE:
        raise InputError(f"{type(component).__name__}.size must be at most {MOST_SIDE}, got {component.size}")
    for field, allowed in (("resize", ("squash", "crop")), ("channels", (1, 3))):
        if hasattr(component, field):
            one_of(component, field, allowed)
    if hasattr(component, "fractions"):
        checked_fractions(component.fractions)


def folder_at(path: str, name: str) -> Path:
    """A folder that is there.

    Raises:
        MissingDataError: there is none, naming the data set.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MissingDataError(f"{name}: no folder {str(folder)!r}; set path to the folder of your images")
    return folder


@DATASETS.register("image-folder")
@dataclass(frozen=True)
class ImageFolder:
    """Your own images: a folder a class, names sorted (torchvision's ImageFolder). Also written ``image-folder:PATH``.

    Hidden files, those of systems (``__MACOSX``, ``Thumbs.db``, ...) and those that are no images by their ending are
    left out, with a warning that counts them. Splits are stratified. The digest covers the contents of files.

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
        check_images(self)

    def load(self) -> Data:
        """List the files.

        Raises:
            MissingDataError: if there is no such folder.
            InputError: if it does not hold a folder with images for each of two classes or more; a file that cannot be
                opened.
        """
        folder = folder_at(self.path, "image-folder")
        found = listed(folder)
        found.warn()
        dataset = Files(folder, found.names, found.labels, self.size, self.resize, self.channels)
        splits = Splits.stratified(found.labels, self.fractions, self.seed)
        return of_files(f"image-folder:{folder.resolve().name}", found.classes, dataset, splits)


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
        check_images(self)
        one_of(self, "variant", ("160px", "320px", "full"))

    def load(self) -> Data:
        """List the files.

        Raises:
            MissingDataError: if they are not there.
        """
        folder, classes = self._fetch()
        train, test = self._part(folder / "train"), self._part(folder / "val")
        splits = Splits.stratified(train.labels, (1 - self.defense_share, self.defense_share, 0.0), self.seed)
        tested = test.fingerprint(test.looked()).hex()
        digest = train.fingerprint(train.looked()).add(tested, classes, splits)
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
        found = listed(folder)
        return Files(folder, found.names, found.labels, self.size, "crop", 3)
