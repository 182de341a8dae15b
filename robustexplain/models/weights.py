"""Reading weights files, without running code that they may hold."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError, MissingDataError, RobustExplainWarning
from .around import innermost
from .classifier import Classifier
from .tables import TableClassifier

KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
"""Keys under which a checkpoint may hold the weights; the first that exists counts."""
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
"""Keys of averaged weights, which are read only on request."""
_PREFIXES = ("module.", "_orig_mod.")
"""What data-parallel training and torch.compile put before every name."""


def read(path: str | PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file or in a torch file (read with ``weights_only=True``).

    One nested in a checkpoint is found under any of ``KEYS``; the prefixes of data-parallel training and of
    ``torch.compile`` are dropped.

    Args:
        path: the file.
        key: take the state dict under this key of the checkpoint, such as ``"state_dict_ema"``.

    Raises:
        MissingDataError: if there is no such file.
        InputError: if the file cannot be read or holds no state dict.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingDataError(f"no weights file {str(file)!r}; expected a .safetensors file or a torch state dict")
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _torch_file(file)
    except pickle.UnpicklingError as error:
        raise InputError(f"cannot read weights from {str(file)!r}: {_refused(error)}") from error
    except Exception as error:  # damaged bytes lead torch's unpickler into any kind of error
        raise InputError(f"cannot read weights from {str(file)!r}: {error}") from error
    return _without_prefixes(_state_of(content, str(file), key))


def _torch_file(file: Path) -> Any:
    # Training scripts keep their arguments beside the weights; a Namespace is a bag of values without code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _refused(error: Exception) -> str:
    """What to do about a file that torch does not read as mere weights; its own advice would run the file's code."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"it holds Python objects beside tensors ({named[1]})" if named else "it is damaged, or no torch file"
    return f"{what}; save the weights alone where they were made: torch.save(model.state_dict(), PATH)"


def _state_of(content: Any, file: str, key: str | None) -> dict[str, Tensor]:
    if key is not None:
        if key not in _nested(content):
            raise InputError(f"{file!r} holds no state dict under {key!r}; it has {_listed(_nested(content))}")
        return dict(content[key])
    if _is_state(content):
        return dict(content)
    nested = _nested(content)
    chosen = next((k for k in KEYS if k in nested), None)
    if chosen is None:
        more = f"; under {_listed(nested)} it has some: say which with weights_key" if nested else ""
        raise InputError(f"{file!r} holds no state dict (tensors by name, possibly under {', '.join(KEYS)}){more}")
    averaged = [k for k in AVERAGED if k in nested]
    if averaged:
        warnings.warn(
            f"{file!r} holds averaged weights too; taken are those under {chosen!r}. For the averaged ones say "
            f"weights_key={averaged[0]!r}",
            RobustExplainWarning,
        )
    return dict(content[chosen])


def _nested(content: Any) -> list[str]:
    return [str(k) for k, v in content.items() if _is_state(v)] if isinstance(content, dict) else []


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # A part of a network may be compiled alone: then the prefix stands within the names.
    state = {key.replace("._orig_mod.", "."): value for key, value in state.items()}
    if {key.partition(".")[0] for key in state} == {"module", "n_averaged"}:
        # torch's averaged models count in a tensor of their own.
        del state["n_averaged"]
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_file_into(classifier: Classifier | TableClassifier, path: str | PathLike[str], key: str | None = None) -> None:
    """Load a file strictly: a whole classifier's state dict, or that of its inner network.

    Names that all begin with ``model.`` (a training framework's module around the network) are read without it.

    Raises:
        MissingDataError: if there is no such file.
        InputError: listing missing and unexpected keys, tensors of another shape, or those that are not finite.
    """
    state = read(path, key)
    if all(name.startswith("model.") for name in state) and not any(
        name.startswith("model.") for name in classifier.net.state_dict()
    ):
        state = {name.removeprefix("model."): value for name, value in state.items()}
    whole = {"mean", "std"} <= state.keys() and all(k in ("mean", "std") or k.startswith("net.") for k in state)
    # A file of a network that stands inside of the classifier's own, as those of Hugging Face do.
    inside = state.keys().isdisjoint(classifier.net.state_dict())
    network = innermost(classifier.net) if inside else classifier.net
    load_state(classifier if whole else network, state, str(path))


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Strict loading whose error lists what is missing and what is unexpected.

    Raises:
        InputError: naming ``source``.
    """
    own = module.state_dict()
    _refuse_not_finite(module, state, source)
    shapes = [
        f"{k} is {list(v.shape)}, expected {list(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if shapes:
        raise InputError(
            f"weights of {source!r} do not fit: {_listed(shapes)}. Another num_classes, in_channels or in_features?"
        )
    # PyTorch's comparison of keys: it accepts files that lack num_batches_tracked.
    result = module.load_state_dict(state, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise InputError(
            f"weights of {source!r} do not fit: missing keys: {_listed(result.missing_keys)}; "
            f"unexpected keys: {_listed(result.unexpected_keys)}"
        )


def _refuse_not_finite(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    # Buffers may hold infinity, as the masks of causal attention do.
    masks = {name for name, _ in module.named_buffers()}
    bad = [
        f"{name} ({int((~value.isfinite()).sum())} of {value.numel()} numbers)"
        for name, value in state.items()
        if value.is_floating_point() and bool((value.isnan() if name in masks else ~value.isfinite()).any())
    ]
    if bad:
        raise InputError(
            f"weights of {source!r} hold NaN or infinity: {_listed(bad)}. Has the training diverged, or is the file "
            "damaged? Take an earlier checkpoint"
        )


def _listed(words: list[str], most: int = 8) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return (", ".join(words[:most]) or "none") + more
