"""Model-guided interpretation: a network trained to predict the mask that keeps the prediction (RTS)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import maps as ops
from ...autograd import layers
from ...checks import Kind
from ...door import answer
from ...errors import InputError
from ...fields import NonNegative, Positive, check_fields
from ...models import ModelSpec
from ...random_streams import Streams
from ...registry import PARTS
from ..base import Explanation, Interpreter, explained_class, pick


class MaskingModel(nn.Module):
    """An encoder with a U-Net on top that predicts a mask for a given class (Dabkowski and Gal 2017, section 4).

    The encoder is a classifier; its last feature map at each grid size feeds the U-Net. A class embedding
    gates the coarsest features (the class selector). Departure: the mask is the sigmoid of one channel, where the
    original divides ``|a|`` by ``|a| + |b|``, which has a kink.

    Args:
        encoder: a classifier ``[B, C, H, W] -> [B, K]``.
        levels: names and channels of its feature layers, finest first (see :func:`MaskingModel.around`).
        num_classes: ``K``.
        width: channels of the U-Net.
    """

    def __init__(self, encoder: nn.Module, levels: list[tuple[str, int]], num_classes: int, width: int = 24) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes, self.width = num_classes, width
        self.levels = [(str(name), int(channels)) for name, channels in levels]
        coarsest = self.levels[-1][1]
        self.selector = nn.Embedding(num_classes, coarsest)
        nn.init.normal_(self.selector.weight, std=coarsest**-0.5)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for _, channels in self.levels)
        self.merge = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in self.levels[:-1])
        self.refine = nn.Conv2d(width, width, 3, padding=1)
        self.draw = nn.Conv2d(width, 1, 3, padding=1)

    @property
    def spec(self) -> ModelSpec:
        """How to rebuild it around its encoder."""
        options = {"encoder": self.encoder, "levels": self.levels}
        return ModelSpec("masking-model", {**options, "num_classes": self.num_classes, "width": self.width})

    @classmethod
    def around(cls, encoder: nn.Module, x: Tensor, width: int = 24, levels: int = 3) -> MaskingModel:
        """Build one around ``encoder``, its feature layers found by a forward pass on ``x[:1]``.

        Only the ``levels`` coarsest grids are used; the mask has the size of the finest of them.
        """
        found = layers.pyramid(encoder, x)[-levels:]
        with torch.no_grad():
            num_classes = encoder(x[:1]).shape[1]
        return cls(encoder, [(layer.name, layer.channels) for layer in found], num_classes, width)

    def train(self, mode: bool = True) -> MaskingModel:
        """Train mode for the U-Net; the encoder stays in eval mode and keeps its batch statistics."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mask ``[B, h, w]`` in ``[0, 1]`` (1 keeps) for class ``target``, and the encoder's logits ``[B, K]``."""
        names = [name for name, _ in self.levels]
        with layers.captured(self.encoder, names) as outputs:
            logits = self.encoder(x)
        target = logits.argmax(1) if target is None else target
        features = [outputs[name] for name in names]
        gate = torch.einsum("bkhw,bk->bhw", features[-1], self.selector(target)).sigmoid()
        features[-1] = features[-1] * gate[:, None]
        merged = self.lateral[-1](features[-1]).relu()
        for level in range(len(features) - 2, -1, -1):
            lateral = self.lateral[level](features[level])
            merged = F.interpolate(merged, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            merged = self.merge[level](torch.cat([lateral, merged], 1)).relu()
        merged = self.refine(merged).relu()
        return self.draw(merged)[:, 0].sigmoid(), logits


PARTS.register("masking-model", paper="Dabkowski and Gal 2017")(MaskingModel)


@dataclass(frozen=True)
class MaskObjective:
    """The clean objective of RTS (Zhang et al. 2020, eq. 8; Dabkowski and Gal 2017, eq. 4), per sample.

    ``l1 r_tv(m) + l2 r_av(m) - log f_c(phi(x; m)) + l3 f_c(phi(x; 1 - m))^l4``; ``phi(x; m)`` keeps ``x`` where ``m``
    is 1 and replaces it by a random colour or a Gaussian blur of ``x`` elsewhere. ``r_tv`` and ``r_av`` are *means*
    over pixels.

    Args:
        tv: ``l1``, weight of the total variation.
        average: ``l2``, weight of the mean of the mask.
        destroy: ``l3``, weight of the class probability of the removed part.
        power: ``l4``.
        blur: largest standard deviation of the blur, as a share of the image's side.
    """

    tv: NonNegative = 2.0
    average: NonNegative = 5.0
    destroy: NonNegative = 2.0
    power: Positive = 0.3
    blur: Positive = 0.15

    def __post_init__(self) -> None:
        check_fields(self)

    def terms(self, model: nn.Module, x: Tensor, y: Tensor, mask: Tensor, streams: Streams) -> dict[str, Tensor]:
        """Each weighted term ``[B]`` by name: ``tv``, ``average``, ``preserve``, ``destroy``; mask ``[B, h, w]``."""
        full = ops.resize(mask, x.shape[-2:])[:, None]
        background = self.background(x, streams)
        kept = full * x + (1 - full) * background
        removed = (1 - full) * x + full * background
        log_p = model(torch.cat([kept, removed])).log_softmax(1)
        preserved, destroyed = pick(log_p, torch.cat([y, y])).chunk(2)
        return {
            "tv": self.tv * ops.total_variation(mask),
            "average": self.average * mask.mean((1, 2)),
            "preserve": -preserved,
            # p^l4 as exp(l4 log p): its gradient at p = 0 stays finite.
            "destroy": self.destroy * (self.power * destroyed).exp(),
        }

    def background(self, x: Tensor, streams: Streams) -> Tensor:
        """What replaces ``x`` where the mask is 0: a random colour or the sample's blur, each with chance 1/2."""
        channels = x[:, :, :1, :1]
        colour = streams.uniform(channels).expand_as(x)
        choice = streams.uniform(channels[:, :1])
        sigma = (0.3 + 0.7 * streams.uniform(channels[:, :1])) * self.blur * min(x.shape[-2:])
        return torch.where(choice < 0.5, colour, gaussian_blur(x, sigma.flatten()))


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image ``[B, C, H, W]`` with its own standard deviation ``[B]`` in pixels; borders are replicated."""
    radius = int(3 * float(sigma.max())) + 1
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)[None]
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    # Cut off at the sample's own radius, so that its blur does not depend on the largest of its batch.
    kernel = kernel * (offsets.abs() <= (3 * sigma[:, None]).floor() + 1)
    kernel = kernel / kernel.sum(1, keepdim=True)
    batch, channels, height, width = x.shape
    rows = kernel.repeat_interleave(channels, 0)[:, None]
    flat = F.pad(x.reshape(1, batch * channels, height, width), [radius] * 4, mode="replicate")
    flat = F.conv2d(flat, rows[..., None], groups=batch * channels)
    flat = F.conv2d(flat, rows[:, :, None], groups=batch * channels)
    return flat.reshape(batch, channels, height, width)


@dataclass(frozen=True, eq=False)
class RTS(Interpreter):
    """Real-time saliency: a trained network predicts the mask in one pass (Zhang et al. 2020, section 3.4).

    Maps are masks in ``[0, 1]``, 1 where the pixel matters. Train one with
    :func:`robustexplain.interpreters.train_rts`.

    Args:
        masker: the trained :class:`MaskingModel`; it has its own encoder and does not use ``model``.

    Examples:
        >>> import torch
        >>> from robustexplain.interpreters import RTS, MaskingModel
        >>> from robustexplain import models
        >>> model = models.load("small-cnn", num_classes=10, in_channels=1)
        >>> x = torch.rand(2, 1, 32, 32)
        >>> masker = MaskingModel.around(model, x, width=8).eval()  # of random weights: train_rts trains one
        >>> RTS(model, masker)(x).shape
        torch.Size([2, 32, 32])
    """

    masker: MaskingModel = field()

    unit_range: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    explains_scalars: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.masker, MaskingModel):
            raise InputError(f"masker must be a MaskingModel, got {type(self.masker).__name__}")

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        if self.masker.encoder.training:
            raise InputError("the masker is in train mode, where batch norm mixes samples; call masker.eval() first")
        logits = answer(self.model, x)
        mask, encoder_logits = self.masker(x, explained_class(logits, target))
        return Explanation(logits, mask, encoder_logits)
