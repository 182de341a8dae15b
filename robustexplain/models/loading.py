"""From a name to a classifier: ``build`` makes the architecture, ``load`` gives it weights."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import InputError
from ..registry import MODELS, Entry
from .classifier import Classifier, ModelSpec
from .tables import TableClassifier
from .weights import load_file_into

PREFIXES = ("timm", "torchvision", "hf")

Built: TypeAlias = Classifier | TableClassifier
"""What a builder returns. Others may return a module of their own that has the same attributes: ``num_classes``, and
``in_channels`` (it takes images) or ``in_features`` (it takes a table's rows)."""
SIZES = ("num_classes", "in_channels", "in_features")


def build(spec_or_name: ModelSpec | str, *, seed: int = 0, **options: Any) -> Built:
    """An architecture with random weights, in eval mode: nothing is downloaded, no weights file is read.

    Args:
        spec_or_name: a :class:`ModelSpec` (``classifier.spec``), or a name with ``options``.
        seed: seed of the random weights; the global random state is left alone.
        options: the builder's own keyword arguments; they go over those of a spec.

    Raises:
        UnknownNameError: with the nearest names.
        InputError: for an option that the model does not have.
    """
    spec = ModelSpec(spec_or_name) if isinstance(spec_or_name, str) else spec_or_name
    return _construct(spec.name, {**spec.options, **options}, seed, pretrained=False)


def load(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    in_features: int | None = None,
    weights: str | PathLike[str] | None = None,
    weights_key: str | None = None,
    pretrained: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Built:
    """A classifier by name, in eval mode.

    Args:
        name: a registered name, ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME``.
        num_classes: number of logits; default the model's own.
        in_channels: channels of the images; default the model's own.
        in_features: columns of the table, for a model that takes rows (``mlp``, ``linear``).
        weights: a ``.safetensors`` file or a torch state dict, of the whole classifier or of its inner network.
        weights_key: which of a checkpoint's state dicts, such as ``"state_dict_ema"``; default the usual ones.
        pretrained: take the weights that the model's library offers (a download for timm and torchvision). Default:
            only for models whose weights are installed (``efficientnet-lite0``) or that are named by them (``hf:``),
            and not if ``weights`` are given.
        seed: seed of the random weights; the global random state is left alone.
        options: further keyword arguments of the model's builder; ``transforms`` names what stands in front of it.

    Raises:
        UnknownNameError: with the nearest names.
        MissingDataError: for weights that are not on this machine, with how to get them.
        InputError: for weights that do not fit, listing the keys.

    Examples:
        >>> import torch
        >>> from robustexplain import models
        >>> model = models.load("small-cnn", num_classes=10, in_channels=1)
        >>> model(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """
    if weights is not None and pretrained:
        raise InputError("give either weights or pretrained=True, not both")
    sizes = zip(SIZES, (num_classes, in_channels, in_features), strict=True)
    options |= {k: v for k, v in sizes if v is not None}
    classifier = _construct(name, options, seed, pretrained=False if weights is not None else pretrained)
    if weights is not None:
        load_file_into(classifier, weights, weights_key)
    return classifier


def has_random_weights(name: str) -> bool:
    """Whether :func:`load` gives a classifier of that name random weights, unless it is told otherwise."""
    entry, _ = _resolve(name, {})
    known = inspect.signature(entry.build).parameters.get("pretrained")
    return known is None or known.default is not True


def _construct(name: str, options: dict[str, Any], seed: int, pretrained: bool | None) -> Built:
    options = dict(options)
    transforms = options.pop("transforms", ())
    entry, options = _resolve(name, options)
    accepted = inspect.signature(entry.build).parameters
    _check_options(entry, options, [p for p in accepted if p != "pretrained"])
    arguments = dict(options)
    if "pretrained" in accepted:
        arguments |= {} if pretrained is None else {"pretrained": pretrained}
    elif pretrained:
        raise InputError(f"{entry.name} has no pretrained weights: train it, or give a file with weights=PATH")
    # Only the CPU's generator is seeded, since torch.manual_seed would reseed every GPU's for the rest of the run.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = entry.build(**arguments)
    _check_built(entry, classifier)
    classifier.spec = _spec(entry, options, classifier, accepted)
    built: Built = classifier.eval()
    return _in_front_of(built, transforms)


def _in_front_of(built: Built, transforms: Any) -> Built:
    if not transforms:
        return built
    if not isinstance(built, Classifier):
        raise InputError(f"transforms stand in front of a models.Classifier, got {type(built).__name__}")
    return built.with_transforms(transforms)


def _check_built(entry: Entry, made: Any) -> None:
    known = [size for size in SIZES if hasattr(made, size)]
    if not isinstance(made, nn.Module) or len(known) != 2 or known[0] != SIZES[0]:
        raise InputError(
            f"the builder of {entry.name} must return a models.Classifier or models.TableClassifier (or a module with "
            f"num_classes and either in_channels or in_features), got {type(made)}"
        )


def _resolve(name: str, options: dict[str, Any]) -> tuple[Entry, dict[str, Any]]:
    prefix, colon, architecture = name.partition(":")
    if colon and prefix in PREFIXES:
        return MODELS.get(prefix), {"architecture": architecture, **options}
    return MODELS.get(name), dict(options)


def _check_options(entry: Entry, options: dict[str, Any], accepted: list[str]) -> None:
    unknown = sorted(options.keys() - set(accepted))
    if unknown:
        raise InputError(f"model {entry.name!r} has no option {', '.join(unknown)}; it has: {', '.join(accepted)}")
    if "architecture" in accepted and not options.get("architecture"):
        raise InputError(f"model {entry.name!r} needs an architecture: '{entry.name}:NAME'")
    for key in SIZES:
        value = options.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{key} must be an integer of at least 1, got {value!r}")


def _spec(entry: Entry, options: dict[str, Any], classifier: Any, accepted: Collection[str]) -> ModelSpec:
    rest = {k: v for k, v in options.items() if k != "architecture"}
    name = f"{entry.name}:{options['architecture']}" if "architecture" in options else entry.name
    # A builder may fix a size, which is then no option of its own.
    sizes = {k: getattr(classifier, k) for k in SIZES if k in accepted and hasattr(classifier, k)}
    # What the builder itself says goes into the description too, such as a configuration that it looked up.
    own = getattr(classifier, "spec", None)
    return ModelSpec(name, {**(own.options if isinstance(own, ModelSpec) else {}), **rest, **sizes})
