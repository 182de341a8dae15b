"""Data sets that fit in memory: scikit-learn's digits, Fashion-MNIST, CIFAR-10."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..errors import InputError, MissingDataError
from ..fields import Count, Fraction, Natural, check_fields
from ..registry import DATASETS
from .base import Data, Digest, Item, Splits, checked_fractions, checked_labels

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


class Arrays(Dataset[Item]):
    """Images held in memory: 8-bit ones are scaled by 1/255 as they are read, and resized if asked.

    Args:
        images: uint8, or float in [0, 1], ``[N, C, H, W]``.
        labels: ``N`` classes.
        size: side to resize to (bilinear, with antialiasing); ``None`` leaves them as they are.
    """

    def __init__(self, images: Tensor, labels: Sequence[int], size: int | None = None) -> None:
        self.images = images
        self.labels = [int(label) for label in labels]
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        x = self.images[index]
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            side = (self.size, self.size)
            x = F.interpolate(x[None], side, mode="bilinear", antialias=True)[0].clamp(0, 1)
        return x, self.labels[index]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an item."""
        channels, height, width = self.images.shape[1:]
        return (channels, self.size, self.size) if self.size else (channels, height, width)

    def fingerprint(self) -> Digest:
        """A digest of content, labels and size."""
        return Digest(self.images, self.labels, self.shape)


def default_root() -> Path:
    """The default folder of downloads: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "robustexplain"


def official(name: str, classes: Sequence[str], train: Arrays, test: Arrays, share: float, seed: int) -> Data:
    """A data set evaluated on its official test part; a stratified ``share`` of the rest is for defenses."""
    for part, source in ((train, "train"), (test, "test")):
        checked_labels(part.labels, len(classes), f"{name}, {source} part")
    splits = Splits.stratified(train.labels, (1 - share, share, 0.0), seed)
    digest = Digest(name, train.fingerprint().hex(), test.fingerprint().hex(), splits.train, splits.defense)
    parts = Subset(train, splits.train), Subset(train, splits.defense)
    return Data(name, tuple(classes), train.shape, *parts, test, digest.hex())


@DATASETS.register("digits", paper="Alpaydin & Kaynak 1998, in scikit-learn")
@dataclass(frozen=True)
class Digits:
    """1797 handwritten digits, in scikit-learn's own package: nothing to download.

    The 8x8 images (16 grey levels) are enlarged bilinearly to three quarters of ``size`` and padded, so that a digit
    has an empty border around it. Splits are stratified; there is no official test part.

    Args:
        seed: of the split.
        size: side in pixels; a multiple of 8.
        fractions: shares of train, defense and test.
    """

    seed: Natural = 0
    size: Count = 32
    fractions: tuple[float, float, float] = (0.5, 0.3, 0.2)

    def __post_init__(self) -> None:
        check_fields(self)
        checked_fractions(self.fractions)
        if self.size % 8:
            raise InputError(f"Digits.size must be a multiple of 8, got {self.size}")

    def load(self) -> Data:
        """Read the digits."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        small = torch.from_numpy(bunch.images).float()[:, None] / 16
        inner, border = self.size * 3 // 4, self.size // 8
        images = F.pad(F.interpolate(small, (inner, inner), mode="bilinear"), (border,) * 4).clamp(0, 1)
        dataset = Arrays(images, bunch.target.tolist())
        splits = Splits.stratified(dataset.labels, self.fractions, self.seed)
        # Over the 8x8 originals: the enlarged ones may differ in the last bit from machine to machine.
        digest = Digest("digits", small, dataset.labels, self.size, splits)
        return Data("digits", tuple("0123456789"), dataset.shape, *splits.of(dataset), digest.hex())


@DATASETS.register("fashion-mnist", paper="Xiao, Rasul & Vollgraf 2017")
@dataclass(frozen=True)
class FashionMNIST:
    """70,000 grey images of clothing, 28x28, ten classes; evaluated on the official test part of 10,000.

    Args:
        seed: of the split of the official train part.
        root: folder with the four idx files (plain or .gz), or torchvision's root. Default: the Debian package's
            folder, then the user's cache folder.
        size: side to resize to; default 28.
        download: let torchvision download them into ``root``.
        defense_share: the share of the official train part that is for defenses.
    """

    seed: Natural = 0
    root: str | None = None
    size: Count | None = None
    download: bool = False
    defense_share: Fraction = 1 / 6

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self) -> Data:
        """Read the idx files.

        Raises:
            MissingDataError: if they are not there.
            InputError: if they are broken.
        """
        train, test = (Arrays(*self._part(prefix), self.size) for prefix in ("train", "t10k"))
        return official("fashion-mnist", FASHION_CLASSES, train, test, self.defense_share, self.seed)

    def _part(self, prefix: str) -> tuple[Tensor, list[int]]:
        images = read_idx(self._file(f"{prefix}-images-idx3-ubyte"), 3)
        labels = read_idx(self._file(f"{prefix}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels):
            raise InputError(f"fashion-mnist {prefix}: {len(images)} images but {len(labels)} labels")
        return torch.from_numpy(images)[:, None], labels.tolist()

    def _file(self, name: str) -> Path:
        found = self._find(name)
        if found is None and self.download:
            _fashion_download(Path(self.root).expanduser() if self.root else default_root())
            found = self._find(name)
        if found is None:
            places = ", ".join(str(folder) for folder in self._folders())
            raise MissingDataError(
                f"fashion-mnist: no {name} (or .gz) in {places}. On Debian or Ubuntu run `apt-get install "
                "dataset-fashion-mnist`; or set root to the folder that holds it; or set download: true"
            )
        return found

    def _find(self, name: str) -> Path | None:
        files = (folder / f"{name}{ending}" for folder in self._folders() for ending in ("", ".gz"))
        return next((file for file in files if file.is_file()), None)

    def _folders(self) -> list[Path]:
        root = Path(self.root).expanduser() if self.root else default_root()
        folders = [root, root / "FashionMNIST" / "raw"]
        return folders if self.root else [DEBIAN_FASHION, *folders]


def _fashion_download(root: Path) -> None:
    from torchvision.datasets import FashionMNIST as Torchvision

    try:
        Torchvision(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise MissingDataError(f"fashion-mnist: the download to {root} failed: {error}") from error


def read_idx(path: Path, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """An idx file of unsigned bytes, plain or gzip.

    Raises:
        InputError: naming the file, if it is not one or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise InputError(f"{path} is not an idx file of bytes in {dimensions} dimension(s): starts {content[:4]!r}")
    shape = np.frombuffer(content[4:header], dtype=">u4").astype(np.int64)
    if len(content) - header != int(shape.prod()):
        raise InputError(f"{path} is cut short: {len(content) - header} bytes of data, expected {int(shape.prod())}")
    # A copy, since torch wants memory it may write to.
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(tuple(shape.tolist())).copy()


@DATASETS.register("cifar10", paper="Krizhevsky 2009")
@dataclass(frozen=True)
class CIFAR10:
    """60,000 colour images, 32x32, ten classes; evaluated on the official test part of 10,000.

    Args:
        seed: of the split of the official train part.
        root: torchvision's root, the folder above ``cifar-10-batches-py``. Default: the user's cache folder.
        size: side to resize to; default 32.
        download: let torchvision download it into ``root``.
        defense_share: the share of the official train part that is for defenses.
    """

    seed: Natural = 0
    root: str | None = None
    size: Count | None = None
    download: bool = False
    defense_share: Fraction = 0.2

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self) -> Data:
        """Read the batches.

        Raises:
            MissingDataError: if they are not there, or differ from the published ones.
        """
        train, test = self._part(True), self._part(False)
        classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
        return official("cifar10", classes, train, test, self.defense_share, self.seed)

    def _part(self, train: bool) -> Arrays:
        from torchvision.datasets import CIFAR10 as Torchvision

        root = Path(self.root).expanduser() if self.root else default_root()
        try:
            part = Torchvision(str(root), train=train, download=self.download)
        except (OSError, RuntimeError) as error:
            raise MissingDataError(
                f"cifar10: not in {root} ({error}). Set download: true; or set root to the folder that holds "
                "cifar-10-batches-py, from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
            ) from error
        return Arrays(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), part.targets, self.size)
