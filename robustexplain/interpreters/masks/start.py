"""A masker's weights from a file: of a saved system, of a checkpoint, or its state dict alone."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...errors import FieldError, InputError, MissingDataError
from ...models.weights import load_state, read
from .rts import MaskingModel

_MARK = "selector.weight"
"""A tensor that every masker has."""
_ENDS_WITH = ("best.", "average.", "module.")
"""Under which of a checkpoint's names the weights stand that the training had at last; the first that is there."""


def start_file(start: str) -> Path:
    """The file that ``start`` names: itself, or the weights of a saved system's folder.

    Raises:
        MissingDataError: no such file.
    """
    path = Path(start).expanduser()
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise MissingDataError(f"RTSTraining.start: no file at {str(file)!r}")
    return file


def load_start(masker: MaskingModel, start: str) -> None:
    """Give ``masker`` the weights of the one in ``start``, its encoder's included.

    Raises:
        MissingDataError: no such file.
        FieldError: a file that holds no masker or several, or one of other shapes.
    """
    file = start_file(start)
    try:
        tensors = read(file)
        load_state(masker, _masker_in(tensors, str(file)), str(file))
    except MissingDataError:
        raise
    except InputError as error:
        said = f"must hold a masker of this width, these levels and this classifier: {error}"
        raise FieldError("RTSTraining", "start", said) from error


def _masker_in(tensors: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    prefixes = [key.removesuffix(_MARK) for key in tensors if key.endswith(_MARK)]
    prefixes = [next((p for p in _ENDS_WITH if p in prefixes), "")] if "module." in prefixes else prefixes
    if len(prefixes) != 1:
        raise InputError(f"{file!r} holds {len(prefixes) or 'no'} maskers")
    return {key.removeprefix(prefixes[0]): value for key, value in tensors.items() if key.startswith(prefixes[0])}
