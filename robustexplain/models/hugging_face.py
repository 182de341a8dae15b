"""Image classifiers of Hugging Face, by their own loader: ``hf:google/vit-base-patch16-224`` or ``hf:./folder``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..answers import read
from ..data.inputs import InputSpec
from ..data.pictures import Resize
from ..errors import InputError, MissingDataError, UnknownNameError
from ..registry import MODELS
from .around import Around
from .classifier import Classifier, ModelSpec
from .image_processor import Preparation, measured


class HuggingFace(Around):
    """The logits of a classifier of transformers.

    Args:
        model: takes ``pixel_values``.
        flip: whether it takes the channels in the other order (blue first).
    """

    def __init__(self, model: nn.Module, flip: bool = False) -> None:
        super().__init__(model)
        self.flip = flip

    def around(self, model: nn.Module) -> HuggingFace:
        """The same around another model."""
        return HuggingFace(model, self.flip)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of normalised images.

        Raises:
            InputError: images of a size that the model does not take.
        """
        try:
            answer = self.model(pixel_values=x.flip(1) if self.flip else x)
        except ValueError as error:
            raise InputError(f"{type(self.model).__name__} refuses images of shape {list(x.shape)}: {error}") from error
        return read(answer, "logits", type(self.model).__name__)

    def extra_repr(self) -> str:
        """The order of the channels, where it is the other one."""
        return "flip=True" if self.flip else ""


@MODELS.register("hf", paper="Wolf et al. 2020 (the transformers library)", needs=("transformers",))
def hugging_face(
    architecture: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    pretrained: bool = True,
    config: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    flip: bool = False,
    size: Sequence[int] | None = None,
    resize: Resize = "crop",
) -> Classifier:
    """Any image classifier in Hugging Face's format: ``hf:google/vit-base-patch16-224``, ``hf:./folder``.

    Normalisation, size and class names are those of its image processor and configuration: the classifier's ``inputs``
    are for a ``System``. Weights are read from safetensors alone, no code of the repository runs, and attention is
    computed step by step, so that it can be seen and differentiated twice. What is on this machine already is not
    looked for anew. The configuration is a part of the ``spec``, so that a saved system is read without a network.

    Args:
        architecture: a repository's name, or a folder.
        num_classes: with another number than the checkpoint's, the head is new and untrained.
        in_channels: channels of the images; other than the checkpoint's only without its weights.
        pretrained: take the checkpoint's weights.
        config: its configuration, in place of the one in the repository.
        mean: a number a channel, in place of the image processor's.
        std: a number a channel, in place of the image processor's.
        flip: whether it takes blue first; with ``mean`` and ``std``.
        size: ``(H, W)``; with ``mean`` and ``std``.
        resize: how images are brought to ``size``.

    Raises:
        MissingDataError: the package transformers, the repository or a file of it cannot be had.
        InputError: no image classifier, an image processor that does more than normalise, other channels.
    """
    library = _library()
    what, whole = f"hf:{architecture}", config is not None and mean is not None and std is not None
    # What is rebuilt from its description needs no folder.
    name = architecture if whole and not pretrained else _place(architecture)
    found = _config(library, name, what, config)
    trained = int(getattr(found, "num_channels", None) or 3)
    channels = trained if in_channels is None else in_channels
    if pretrained and channels != trained:
        raise InputError(f"the weights of {what} take {trained} channel(s), got in_channels={in_channels}")
    if mean is not None and std is not None:
        given = None if size is None else (int(size[0]), int(size[1]))
        prepared = Preparation(tuple(mean), tuple(std), flip, given, resize)
    else:
        prepared = _prepared(library, name, what, trained)
    if channels != trained:
        found.num_channels, prepared = channels, prepared.of_channels(channels)
    if num_classes not in (None, found.num_labels):
        found.num_labels = num_classes
    found.return_dict = True
    net = _net(library, name, what, found, pretrained, new_head=num_classes is not None)
    return _classifier(net, what, found, prepared, channels)


def _classifier(net: nn.Module, what: str, found: Any, prepared: Preparation, channels: int) -> Classifier:
    """The network with its preparation around it, and what it says of its inputs."""
    side = prepared.size
    made = Classifier(
        HuggingFace(net, prepared.flip),
        prepared.mean,
        prepared.std,
        ModelSpec(what, {"config": json.loads(found.to_json_string(use_diff=False)), **prepared.options()}),
        num_classes=int(found.num_labels),
        input_size=side[0] if side is not None and side[0] == side[1] else None,
    )
    made.inputs = None if channels not in (1, 3) else InputSpec(side, prepared.resize, channels, _names(found))  # type: ignore[arg-type]
    return made


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDataError(
            "models of Hugging Face need the package transformers: pip install 'robustexplain[hf]'"
        ) from error
    return transformers


def _place(architecture: str) -> str:
    """The name of a repository, or the path of a folder that is there."""
    if not architecture.startswith((".", "/", "~")):
        return architecture
    folder = Path(architecture).expanduser()
    if not folder.is_dir():
        raise MissingDataError(f"no folder {str(folder)!r} with a config.json and a model.safetensors")
    return str(folder)


def _config(library: Any, name: str, what: str, given: Mapping[str, Any] | None) -> Any:
    if given is None:
        return _fetched(
            lambda **where: library.AutoConfig.from_pretrained(name, trust_remote_code=False, **where), what
        )
    # Neither code of a repository nor weights of a part are looked for.
    plain = {key: value for key, value in given.items() if key not in ("auto_map", "use_pretrained_backbone")}
    kind = plain.get("model_type")
    if not isinstance(kind, str) or kind not in library.CONFIG_MAPPING:
        raise UnknownNameError("model_type of transformers", str(kind), library.CONFIG_MAPPING)
    return _made(lambda: library.CONFIG_MAPPING[kind].from_dict(plain), what)


def _prepared(library: Any, name: str, what: str, channels: int) -> Preparation:
    def load(**where: Any) -> Any:
        return library.AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **where)

    hint = "; give its normalisation yourself, with mean=[...] and std=[...]"
    return measured(_fetched(load, f"the image processor of {what}", hint), channels, what)


def _net(library: Any, name: str, what: str, config: Any, pretrained: bool, *, new_head: bool) -> nn.Module:
    auto = library.AutoModelForImageClassification
    options = {"trust_remote_code": False, "attn_implementation": "eager", "dtype": torch.float32}
    if not pretrained:
        net: nn.Module = _made(lambda: auto.from_config(config, **options), what)
        return net
    options |= {"config": config, "use_safetensors": True, "output_loading_info": True}
    # Weights of another shape belong to a head for another number of classes.
    options |= {"ignore_mismatched_sizes": new_head}
    net, report = _fetched(lambda **where: auto.from_pretrained(name, **options, **where), what)
    missing = sorted(report["missing_keys"])
    if missing and not new_head:
        raise InputError(
            f"{what} holds no weights for {', '.join(missing[:4])}: it is no trained image classifier; to train a new "
            "head, say num_classes"
        )
    return net


def _fetched(load: Callable[..., Any], what: str, hint: str = "") -> Any:
    """What ``load`` finds on this machine, or else over the network."""

    def anywhere() -> Any:
        try:
            return load(local_files_only=True)
        except OSError:
            return load(local_files_only=False)

    try:
        return _made(anywhere, what)
    except OSError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingDataError(
            f"cannot get {what}: {first}{hint or '; with no network, give a folder: hf:./folder'}"
        ) from error


def _made(make: Callable[[], Any], what: str) -> Any:
    try:
        with _quiet():
            return make()
    except (OSError, InputError):
        raise
    except Exception as error:  # configurations from elsewhere lead the library into any kind of error
        raise InputError(f"cannot build {what}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports: what matters of them becomes an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _names(config: Any) -> tuple[str, ...]:
    """The names of the classes; empty where they are only numbered."""
    names = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names
