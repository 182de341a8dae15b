"""Which interpreter explains which family of models exactly, found by measuring: ``docs/models.md``."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..autograd.blanking import Blanked
from ..autograd.rectifiers import Softplus
from ..errors import InputError
from ..interpreters import LRP, AttentionRollout, DeepLIFT, Gradient, GuidedBackprop, IntegratedGradients, Smoothed
from ..interpreters.cam.sites import Site
from ..registry import INTERPRETERS

FAMILIES: dict[str, tuple[str, int]] = {
    "ResNet": ("timm:resnet18", 64),
    "ResNet (torchvision)": ("torchvision:resnet18", 64),
    "VGG": ("timm:vgg11", 64),
    "DenseNet": ("timm:densenet121", 64),
    "Inception": ("timm:inception_v3", 160),
    "RegNet": ("timm:regnetx_002", 96),
    "NFNet": ("timm:nfnet_l0", 96),
    "EfficientNet": ("timm:efficientnet_b0", 96),
    "EfficientNet-Lite": ("timm:tf_efficientnet_lite0", 96),
    "MobileNetV2 (torchvision)": ("torchvision:mobilenet_v2", 96),
    "MobileNetV3": ("timm:mobilenetv3_small_050", 96),
    "MobileNetV4": ("timm:mobilenetv4_conv_small", 96),
    "SqueezeNet (torchvision)": ("torchvision:squeezenet1_1", 64),
    "ConvNeXt": ("timm:convnext_atto", 96),
    "ConvNeXt V2": ("timm:convnextv2_atto", 96),
    "ViT": ("timm:vit_tiny_patch16_224", 96),
    "DeiT, distilled": ("timm:deit_tiny_distilled_patch16_224", 96),
    "DINOv2 (registers)": ("timm:vit_small_patch14_reg4_dinov2", 70),
    "EVA-02": ("timm:eva02_tiny_patch14_224", 70),
    "CaiT": ("timm:cait_xxs24_224", 64),
    "XCiT": ("timm:xcit_nano_12_p16_224", 96),
    "Swin": ("timm:swin_tiny_patch4_window7_224", 112),
    "Swin (torchvision)": ("torchvision:swin_t", 112),
    "CoaT": ("timm:coat_lite_tiny", 96),
    "PVT v2": ("timm:pvt_v2_b0", 96),
    "MViT v2": ("timm:mvitv2_tiny", 96),
    "MaxViT": ("timm:maxvit_rmlp_pico_rw_256", 128),
    "MobileViT": ("timm:mobilevit_xxs", 128),
    "EfficientFormer": ("timm:efficientformer_l1", 224),
    "LeViT": ("timm:levit_128s", 224),
    "BEiT": ("timm:beit_base_patch16_224", 64),
    "MLP-Mixer": ("timm:mixer_s32_224", 96),
    "ViT (Hugging Face)": ("hf:vit", 32),
    "DeiT (Hugging Face)": ("hf:deit", 32),
    "ResNet (Hugging Face)": ("hf:resnet", 64),
    "ConvNeXt (Hugging Face)": ("hf:convnext", 64),
    "Swin (Hugging Face)": ("hf:swin", 64),
    "MobileNetV2 (Hugging Face)": ("hf:mobilenet_v2", 96),
}
"""A small member of each family, and the side of the images it is measured on; of ``hf:`` a kind of configuration."""

_PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "vit": _PATCHES,
    "deit": {**_PATCHES, "architectures": ["DeiTForImageClassification"]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    "convnext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "patch_size": 4},
    "swin": {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "mobilenet_v2": {"depth_multiplier": 0.35},
}
"""Settings of small configurations of the transformers library, by ``model_type``."""


@dataclass(frozen=True)
class Row:
    """What was measured on one family, by interpreter: the words are explained at the head of the page."""

    family: str
    model: str
    verdicts: dict[str, str]
    reasons: dict[str, str]


def measure(family: str, only: tuple[str, ...] = ()) -> Row:
    """Measure every interpreter of the table, or some, on a family's member with random weights.

    In float64 on one image of noise. The measures: finite differences of the logit (gradients), the difference of the
    logit to the baseline (completeness), the sum of relevance and the logit (conservation), blanked tiles (maps of a
    layer), whether anything changes (smoothing). An exception is a verdict too.
    """
    name, size = FAMILIES[family]
    model, x = _small(name, size), torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    verdicts, reasons = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for column, check in CHECKS.items():
            if only and column not in only:
                continue
            try:
                verdicts[column] = check(model, x)
            except InputError as error:
                verdicts[column], reasons[column] = "refused", str(error)
    return Row(family, name, verdicts, reasons)


def _small(name: str, size: int) -> nn.Module:
    model: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if name.startswith("timm:"):
            model = models.load(name, num_classes=5, input_size=size)
        elif name.startswith("hf:"):
            model = _hugging_face(name.removeprefix("hf:"), size)
        else:
            model = models.load(name, num_classes=5)
        # Some heads and scales are initialised to zero: then there is nothing to explain.
        for parameter in model.parameters():
            if not parameter.any() or parameter.abs().max() <= 1e-4:
                torch.nn.init.normal_(parameter, std=0.02)
        _calibrate(model, torch.rand(8, 3, size, size))
    return model.double().eval()


def _hugging_face(kind: str, size: int) -> nn.Module:
    """A small model of random weights in Hugging Face's format, through the loader of ``hf:``."""
    import transformers

    config = transformers.AutoConfig.for_model(
        kind, image_size=size, num_labels=5, initializer_range=0.2, **HUGGING_FACE[kind]
    )
    with TemporaryDirectory() as folder:
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
        return models.load(f"hf:{folder}")


@torch.no_grad()
def _calibrate(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of some images: with those they start with, deep networks forget the image."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        # The average over all batches, which is one.
        norm.momentum = None
        norm.train()
        norm.reset_running_stats()
    if norms:
        model(images)


TARGET = torch.tensor([3])


def _gradient(model: nn.Module, x: Tensor) -> str:
    rng = torch.Generator().manual_seed(1)
    directions = torch.randn(4, 1, *x.shape[2:], generator=rng).double()
    # So small that next to no rectifier has its kink between the two points; float64 leaves seven digits. A softmax in
    # float32 leaves none of them.
    step, exact, word = (1e-3, 1e-2, "exact to 1%") if _attends_in_float32(model) else (1e-8, 1e-4, "exact")
    with torch.no_grad():
        ends = [torch.stack([model(x + h * d[None])[0, 3] for d in directions]) for h in (step, -step)]
    wanted = (ends[0] - ends[1]) / (2 * step)
    found = (Gradient(model, of="logit", channels="sum").explain(x, TARGET).maps[0].detach() * directions[:, 0]).sum(
        (1, 2)
    )
    return _word(float((found - wanted).norm() / wanted.norm()), exact, word)


def _attends_in_float32(model: nn.Module) -> bool:
    kinds = {type(module) for module in model.modules()}
    return any(kind.__module__.startswith("transformers.") and "Attention" in kind.__name__ for kind in kinds)


def _complete(model: nn.Module, maps: Tensor, x: Tensor, exact: float, word: str = "exact") -> str:
    with torch.no_grad():
        wanted = float((model(x) - model(torch.zeros_like(x)))[0, 3])
    return _word(abs(float(maps.sum()) - wanted) / max(abs(wanted), float(maps.abs().sum())), exact, word)


def _integrated(model: nn.Module, x: Tensor) -> str:
    with torch.no_grad():
        maps = IntegratedGradients(model, steps=20, batch_size=10).explain(x, TARGET).maps
    return _complete(model, maps, x, 1e-2, "complete to 1%")


def _deeplift(model: nn.Module, x: Tensor) -> str:
    return _complete(model, DeepLIFT(model).explain(x, TARGET).maps.detach(), x, 1e-6)


def _lrp(model: nn.Module, x: Tensor) -> str:
    # Biases absorb relevance; without them all of the logit must arrive.
    named = [*model.named_parameters(), *model.named_buffers()]
    kept = {v: v.detach().clone() for n, v in named if n.endswith(("bias", "running_mean"))}
    try:
        for value in kept:
            value.data.zero_()
        found = LRP(model, conv="epsilon").explain(x, TARGET)
    finally:
        for value, before in kept.items():
            value.data.copy_(before)
    share = float((found.maps.sum() / found.logits[0, 3]).detach())
    if not found.maps.any() or not math.isfinite(share):
        return "wrong: no relevance"
    return "exact without biases" if abs(share - 1) < 1e-2 else f"approximate: {share:.2g} of the logit arrives"


def _guided(model: nn.Module, x: Tensor) -> str:
    return "runs" if GuidedBackprop(model).explain(x, TARGET).maps.any() else "wrong: zero"


def _smoothed(model: nn.Module, x: Tensor) -> str:
    base = Gradient(model)
    plain = base.explain(x, TARGET).maps.detach()
    moved, sharp = (Smoothed(model, base, Softplus(b)).explain(x, TARGET).maps.detach() for b in (1.0, 1e6))
    if torch.equal(moved, plain):
        return "nothing changes"
    return _word(float((sharp - plain).norm() / plain.norm()), 1e-2, "runs")


def _cam(name: str) -> Callable[[nn.Module, Tensor], str]:
    def check(model: nn.Module, x: Tensor) -> str:
        interpreter = INTERPRETERS.get(name).build(model)
        maps = interpreter.explain(x, TARGET, native=True).maps.detach()
        site = Site(interpreter._head(x).features.name) if name == "cam" else next(iter(interpreter._sites.values()))
        answer = Blanked(model, x, [site.name]).agrees(site.changes)
        where = f"`{site.name.removeprefix('net.')}`, {maps.shape[1]} x {maps.shape[2]}"
        return {True: f"checked: {where}", None: f"unchecked: {where}, too coarse to tell"}.get(
            answer, f"wrong: {where}"
        )

    return check


def _rollout(model: nn.Module, x: Tensor) -> str:
    # In float32, the only dtype in which every family computes all of its attention.
    maps = AttentionRollout(copy.deepcopy(model).float()).explain(x.float(), native=True).maps
    return f"runs: {maps.shape[1]} x {maps.shape[2]}"


def _word(error: float, exact: float, word: str = "exact") -> str:
    return word if error < exact else f"approximate: {100 * error:.2g}% off"


CHECKS: dict[str, Callable[[nn.Module, Tensor], str]] = {
    "gradient": _gradient,
    "integrated-gradients": _integrated,
    "deeplift": _deeplift,
    "lrp": _lrp,
    "guided-backprop": _guided,
    "smoothed": _smoothed,
    "cam": _cam("cam"),
    "gradcam": _cam("gradcam"),
    "attention-rollout": _rollout,
}


def page(families: Sequence[str] | None = None) -> str:
    """Measure the families, default all, and give the table as a Markdown page: ``docs/models.md``."""
    return written([measure(family) for family in families or FAMILIES])


def written(rows: Sequence[Row]) -> str:
    """The page of what was measured."""
    import timm
    import torchvision
    import transformers

    lines = [
        f"| family | model | {' | '.join(f'`{column}`' for column in CHECKS)} |",
        "| --- " * (len(CHECKS) + 2) + "|",
    ]
    lines += [line(row) for row in rows]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for column, reason in row.reasons.items():
            reasons.setdefault((column, reason), []).append(row.family)
    refused = [f"- `{column}` on {', '.join(names)}: {reason}" for (column, reason), names in sorted(reasons.items())]
    versions = f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}, "
    versions += f"transformers {transformers.__version__}"
    return (
        "\n\n".join([_ABOUT.format(versions=versions), "\n".join(lines), "## Why refused", "\n".join(refused)]) + "\n"
    )


def line(row: Row) -> str:
    """A row of the table."""
    return f"| {row.family} | `{row.model}` | {' | '.join(row.verdicts.get(column, '-') for column in CHECKS)} |"


_ABOUT = """# Which interpreter explains which model

Written by `robustexplain list models --measure > docs/models.md`: measured, not by hand, on a small member of each
family with random weights and one image of noise, in float64 ({versions}).

Batch norms have the statistics of eight images of noise. Models of `hf:` are small configurations.

- `gradient`: *exact* where central differences of the logit in four random directions (step 1e-8) agree to 1e-4; of
  `hf:` models with attention *exact to 1%* (step 1e-3), because the transformers library computes attention's softmax
  in float32.
- `integrated-gradients` (20 points) and `deeplift`: whether the map sums to the difference of the logit to that of a
  black image, to 1% (*complete to 1%*) and to 1e-6 (*exact*), otherwise how far it is off, as a share of the map's
  total. More points are closer.
- `lrp` (epsilon rules): measured on a copy whose biases and running means are set to zero, because they absorb
  relevance. *exact without biases*: the map sums to the logit, to 1%. Position embeddings and class tokens absorb
  relevance as biases do, and so does the softmax of attention: there the share that arrives is given.
- `guided-backprop` and `smoothed` change rectifiers. A network of GELU or SiLU has none and is smooth as it is: both
  refuse it, and SmoothGrad is what averages its gradients over a neighbourhood. `guided-backprop` *runs* where its map
  is not zero: no number says how right it is. `smoothed` *runs* where it changes the map for beta = 1, and tends to the
  plain gradient for a large beta, to 1%.
- `cam` and `gradcam` (`gradcam++` and `layercam` read the same layer): the layer and its grid. *checked*: where one of
  16 tiles of the image is blanked, the layer's map changes most at that place, and no other order of its cells fits
  better. *unchecked*: it is the last convolutional map, but each of its few cells sees the whole image.
- `attention-rollout` *runs* on a grid where, with the identity in place of attention, no token learns of another's
  tile. No number says how right rollout is."""
