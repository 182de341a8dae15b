"""Which images a folder holds: a subfolder a class, without what is hidden or belongs to the system."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataWarning, InputError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Files that are taken for images, in capitals too (torchvision's)."""
_OF_SYSTEMS = {
    *("__macosx", "@eadir", "@recycle", "#recycle", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
}
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "tuning", "defense"}


@dataclass
class Listing:
    """Images by class, in torchvision's order: classes, then folders, then files by name.

    Args:
        folder: above the classes' folders.
        names: the files, relative to ``folder``.
        labels: a class a file.
        classes: names of the subfolders, sorted.
        hidden: how often each name that is hidden, or a system's own, was left out.
        others: how many files of each other ending were left out.
        loose: how many files lie beside the classes' folders.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    hidden: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    loose: int = 0

    def warn(self) -> None:
        """Say what was left out, if anything was."""
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden.total()} hidden or system entries ({_counted(self.hidden)})")
        if self.others:
            parts.append(f"{self.others.total()} files that are no images by their ending ({_counted(self.others)})")
        if self.loose:
            parts.append(f"{self.loose} files beside the classes' folders")
        if parts:
            warnings.warn(f"{str(self.folder)!r}: left out {'; '.join(parts)}", DataWarning, stacklevel=3)


def listed(folder: Path) -> Listing:
    """The images of a folder with a subfolder a class.

    Raises:
        InputError: no subfolder, one alone, one without images, or subfolders that are parts of a data set.
    """
    found = Listing(folder)
    folders = []
    for entry in _entries(folder):
        if _is_hidden(entry.name):
            found.hidden[entry.name] += 1
        elif entry.is_dir():
            folders.append(entry.name)
        else:
            found.loose += 1
    found.classes = tuple(sorted(folders))
    _refuse_parts(folder, found.classes)
    for label, name in enumerate(found.classes):
        names = _images(os.path.join(folder, name), found)
        if not names:
            raise InputError(f"{str(folder)!r}: the folder of class {name!r} holds no image ({', '.join(ENDINGS)})")
        start = len(os.path.join(folder, ""))
        found.names += [path[start:].replace(os.sep, "/") for path in names]
        found.labels += [label] * len(names)
    if len(found.classes) < 2:
        what = f"one class, {found.classes[0]!r}" if found.classes else f"no folder of a class ({found.loose} files)"
        raise InputError(
            f"{str(folder)!r} is no image folder: it holds {what}, and at least two are needed, a subfolder with "
            "images a class. Set path to the folder above the classes; labels in a CSV file are read by csv-folder"
        )
    return found


def _images(folder: str, found: Listing) -> list[str]:
    rows: list[tuple[str, list[str]]] = []
    here = Path(os.path.realpath(found.folder))
    above = {str(here), *map(str, here.parents)}
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        place = os.path.realpath(root)
        if place in above:  # a link to a folder above it, or to another one that is seen already
            folders.clear()
            found.hidden[f"{os.path.basename(root)}, a link to a folder that is seen already"] += 1
            continue
        above.add(place)
        for name in [name for name in [*folders, *names] if _is_hidden(name)]:
            found.hidden[name] += 1
        folders[:] = [name for name in folders if not _is_hidden(name)]
        shown = [name for name in names if not _is_hidden(name)]
        found.others.update(Path(n).suffix.lower() or n for n in shown if not n.lower().endswith(ENDINGS))
        rows.append((root, sorted(name for name in shown if name.lower().endswith(ENDINGS))))
    return [os.path.join(root, name) for root, names in sorted(rows) for name in names]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _unreadable(error)
        raise


def _unreadable(error: OSError) -> None:
    raise InputError(f"cannot read the folder {error.filename!r}: {error.strerror}") from error


def _refuse_parts(folder: Path, classes: tuple[str, ...]) -> None:
    """Refuse a folder above ``train`` and the like: these would be taken for classes."""
    parts = [name for name in classes if name.lower() in _PARTS]
    whole = len(parts) == len(classes) or any(_holds_folders_alone(folder / name) for name in parts)
    if parts and whole:
        raise InputError(
            f"{str(folder)!r} holds parts, not classes: {list(classes)}. Set path to one of them, such as "
            f"{str(folder / parts[0])!r}; it is split by `fractions`"
        )


def _holds_folders_alone(folder: Path) -> bool:
    entries = [entry for entry in _entries(folder) if not _is_hidden(entry.name)]
    return bool(entries) and all(entry.is_dir() for entry in entries)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _counted(counts: Counter[str], most: int = 6) -> str:
    words = [f"{name} {count}" if count > 1 else name for name, count in counts.most_common(most)]
    return ", ".join(words) + (", ..." if len(counts) > most else "")
