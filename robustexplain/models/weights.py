"""Reading weights files, without running code that they may hold."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError, MissingDataError
from .classifier import Classifier
from .tables import TableClassifier


def read(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file or in a torch file (read with ``weights_only=True``).

    One nested under ``"state_dict"`` is found, and the ``module.`` prefix of data-parallel training is dropped.

    Raises:
        MissingDataError: if there is no such file.
        InputError: if the file cannot be read or holds no state dict.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingDataError(f"no weights file {str(file)!r}; expected a .safetensors file or a torch state dict")
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _torch_file(file)
    except Exception as error:  # damaged bytes lead torch's unpickler into any kind of error
        raise InputError(f"cannot read weights from {str(file)!r}: {error}") from error
    nested = content.get("state_dict") if isinstance(content, dict) else None
    state = nested if isinstance(nested, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{str(file)!r} holds no state dict (tensors by name, possibly under 'state_dict')")
    return _without_prefix(state, "module.")


def _torch_file(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not all(key.startswith(prefix) for key in state):
        return dict(state)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def load_file_into(classifier: Classifier | TableClassifier, path: str | PathLike[str]) -> None:
    """Load a file strictly: a whole classifier's state dict, or that of its inner network.

    Raises:
        MissingDataError: if there is no such file.
        InputError: listing missing and unexpected keys, or tensors of another shape.
    """
    state = read(path)
    whole = {"mean", "std"} <= state.keys() and all(k in ("mean", "std") or k.startswith("net.") for k in state)
    load_state(classifier if whole else classifier.net, state, str(path))


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Strict loading whose error lists what is missing and what is unexpected.

    Raises:
        InputError: naming ``source``.
    """
    own = module.state_dict()
    shapes = [
        f"{k} is {list(v.shape)}, expected {list(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if shapes:
        raise InputError(
            f"weights of {source!r} do not fit: {_listed(shapes)}. Another num_classes, in_channels or in_features?"
        )
    # Not our own comparison of keys: PyTorch knows which ones older files may lack (num_batches_tracked).
    result = module.load_state_dict(state, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise InputError(
            f"weights of {source!r} do not fit: missing keys: {_listed(result.missing_keys)}; "
            f"unexpected keys: {_listed(result.unexpected_keys)}"
        )


def _listed(words: list[str], most: int = 8) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return (", ".join(words[:most]) or "none") + more
