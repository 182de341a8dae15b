"""Training of RTS: a U-Net on an encoder learns to predict the mask that keeps the prediction."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ... import maps
from ...autograd.straight_through import straight_through
from ...door import answer
from ...fields import Count, NonNegative, check_fields, identified
from ...files import digest_tensors
from ...random_streams import Streams
from ...registry import INTERPRETERS
from ...training import Samples, Session, Training, TrainingStep, fit, frozen
from .rts import RTS, MaskingModel, MaskObjective
from .start import load_start, start_file


@dataclass(frozen=True)
class RTSTraining:
    """How an RTS is trained: eq. 8 of Zhang et al. 2020 on the labels' class, through Accelerate.

    Args:
        objective: the four terms and their weights.
        training: epochs, batch, optimiser.
        encoder_weight: of the cross-entropy of the encoder, which starts as a copy of the classifier and is
            trained with the U-Net; 0 freezes the encoder.
        width: channels of the U-Net.
        levels: how many of the encoder's coarsest grids the U-Net uses.
        start: begin with the weights of a masker saved before, encoder and U-Net: the folder of a saved system, a
            checkpoint, or a file of its state dict; of the same width, levels and classifier. Default random weights
            around a copy of the classifier.
    """

    objective: MaskObjective = field(default_factory=MaskObjective)
    training: Training = field(default_factory=Training)
    encoder_weight: NonNegative = 0.0
    width: Count = 24
    levels: Count = 3
    start: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def ready(self) -> None:
        """Look for the file to start from, before anything is trained.

        Raises:
            MissingDataError: no such file.
        """
        if self.start is not None:
            start_file(self.start)


def new_masker(model: nn.Module, x: Tensor, settings: RTSTraining, seed: int) -> MaskingModel:
    """An untrained masking model around a copy of the classifier, with weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed every CUDA device, and nothing would put those back.
        torch.default_generator.manual_seed(seed)
        masker = MaskingModel.around(copy.deepcopy(model), x, settings.width, settings.levels)
    masker.encoder.requires_grad_(settings.encoder_weight > 0)
    return masker.to(x.device).eval()


def mask_loss(
    model: nn.Module,
    objective: MaskObjective,
    encoder_weight: float,
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    encoder_logits: Tensor,
    streams: Streams,
) -> Tensor:
    """Eq. 8 plus the encoder's cross-entropy, ``[b]``; the logits always enter, as data-parallel training needs."""
    # The derivative of a rounding transform in front of the model would be zero.
    with straight_through():
        total = torch.stack(list(objective.terms(model, x, y, mask, streams).values())).sum(0)
    return total + encoder_weight * nn.functional.cross_entropy(encoder_logits, y, reduction="none")


def train_rts(
    model: nn.Module,
    data: Samples,
    settings: RTSTraining | None = None,
    *,
    seed: int = 0,
    session: Session | None = None,
    identity: object = None,
) -> RTS:
    """Train an RTS for ``model`` on ``data``.

    Args:
        model: the classifier, in eval mode; it is not changed.
        data: map-style, gives ``(x, label)``.
        settings: objective, epochs, size.
        seed: of the initial weights, the order of the data and the noise.
        session: accelerator, checkpoints, progress.
        identity: hash of model and data, for the checkpoint.

    Raises:
        MissingDataError: no file to start from.
        FieldError: one that holds no masker, or one of another width, other levels or another classifier.
    """
    settings, session = settings or RTSTraining(), session or Session()
    model = model.to(session.device)
    masker = new_masker(model, data[0][0][None].to(session.device), settings, seed)
    known: list[object] = [identity, identified(replace(settings, start=None))]
    if settings.start is not None:
        load_start(masker, settings.start)
        # The weights count, wherever they stand.
        known.append(digest_tensors(masker.state_dict()))

    def loss(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        mask, encoder_logits = module(x, y)
        streams = Streams.of(x, moment.seed, moment.epoch)
        return mask_loss(model, settings.objective, settings.encoder_weight, x, y, mask, encoder_logits, streams)

    with frozen(model):
        fit(masker, loss, data, settings.training, name="rts", seed=seed, session=session, identity=known)
    return RTS(model, masker.requires_grad_(False))


@torch.no_grad()
def clean_objective(
    interpreter: RTS, x: Tensor, y: Tensor, objective: MaskObjective | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """The terms of eq. 8 on clean samples, ``[B]`` each, and their sum: the clean quality of a plain or hardened RTS.

    Args:
        interpreter: the RTS, plain or hardened.
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        y: ``[B]`` labels, the classes whose masks are predicted.
        objective: the weights; pass those of the training.
        seed: of the backgrounds, which are then the same for every interpreter.

    Returns:
        ``tv``, ``average``, ``preserve``, ``destroy``, their sum ``objective``, and ``kept``: 1 where the classifier
        still predicts ``y`` when everything outside of the mask is black.
    """
    mask, _ = interpreter.masker(x, y)
    terms = (objective or MaskObjective()).terms(interpreter.model, x, y, mask, Streams.of(x, seed, "clean-objective"))
    kept = answer(interpreter.model, maps.resize(mask, x.shape[-2:])[:, None] * x).argmax(1) == y
    return {**terms, "objective": torch.stack(list(terms.values())).sum(0), "kept": kept.to(x.dtype)}


INTERPRETERS.register(
    "rts",
    paper="Dabkowski and Gal 2017; Zhang et al. 2020, eq. 8",
    needs=("training",),
    settings=RTSTraining,
    train=train_rts,
)(RTS)
