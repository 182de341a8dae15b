"""Repair of a manipulated or backdoored model: pruning of what clean data do not use, and a short clean fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustexplain.autograd import layers
from robustexplain.data import stack, take
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, Fraction
from robustexplain.files import digest_tensors
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, eval_mode

from ..models.fine_tuned import FineTuned
from ..models.loss_module import HardeningLoss
from ..models.retrained import PlainLoss


@DEFENSES.register("fine-pruning", paper="Liu et al. 2018, Fine-Pruning", needs=("data",))
@dataclass(frozen=True)
class FinePruning(FineTuned):
    """Repair a model: cut off the last features that clean data activate least, then fine-tune it on clean data.

    Features are what the last linear layer reads: where the network pools before it, the channels of its last
    convolution, as in the paper. A feature that was cut off stays so. With ``share`` 0 it is the short clean
    fine-tuning alone.

    Args:
        share: share of the features that are cut off, rounded down, but one at least.
        samples: largest number of clean samples, classes in equal numbers; ``None``: all.
        training: of the fine-tuning.

    Raises:
        FieldError: a share of 1.
        InputError: a single feature.
    """

    share: Fraction = 0.2
    samples: Count | None = None
    training: Training = field(default_factory=lambda: Training(epochs=1, lr=1e-3, weight_decay=0.0))

    part: ClassVar[Literal["train", "defense"]] = "defense"
    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share == 1:
            raise FieldError(type(self).__name__, "share", "must be below 1: no feature would be left")

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        start = digest_tensors(model.state_dict())
        if self.samples is not None and self.samples < len(data):
            data = take(data, self.samples, self.seed)
        if not self.share:
            return self._fine_tuned(model, data, session, start)
        x, _ = stack(data)
        layer = layers.submodule(model, layers.logit_layer(model, x[:1].to(session.device)))
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)  # a linear layer's; for the type checker
        kept = kept_features(model, layer, x.to(session.device), self.share)
        with torch.no_grad():
            weight.mul_(kept)
        # Without a gradient Adam and weight decay leave a zero alone.
        handle = weight.register_hook(lambda gradient: gradient * kept)
        try:
            return self._fine_tuned(model, data, session, start)
        finally:
            handle.remove()

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        return PlainLoss(network)


@torch.no_grad()
def kept_features(model: nn.Module, layer: nn.Module, x: Tensor, share: float, batch: int = 64) -> Tensor:
    """``[D]``: 0 for the ``share`` of the layer's features of smallest mean magnitude on ``x``, 1 for the others.

    Raises:
        InputError: a single feature.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten(1).sum(0)))
    try:
        with eval_mode(model):
            for part in x.split(batch):
                answer(model, part)
    finally:
        handle.remove()
    activity = torch.stack(seen).sum(0)
    if len(activity) == 1:
        raise InputError(
            "fine-pruning cuts off one feature at least, and the last linear layer reads one: set share to 0"
        )
    kept = torch.ones_like(activity)
    kept[activity.argsort(stable=True)[: max(1, int(share * len(activity)))]] = 0
    return kept
