"""A small variational auto-encoder of table rows that draws by dropout (MCD-VAE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import InputError
from ...maps import clipped
from ...models.classifier import ModelSpec
from ...registry import PARTS
from ...training import TrainingStep


class DropoutAutoEncoder(nn.Module):
    """MCD-VAE: a variational auto-encoder whose decoder draws by dropout (Miok et al. 2019; code of Vres et al. 2022).

    Two layers of ``hidden`` and half as many units each way, rectified, dropout behind those of the decoder, which gets
    the mean of the code (the code has no noise, as in the published code). Columns are scaled to ``[0, 1]`` inside.

    Args:
        width: D, columns of a row.
        hidden: units of the layer next to the rows.
        latent: of the code.
        dropout: share of the decoder's units that is dropped, when rows are drawn as in training.

    Raises:
        InputError: fewer than 2 hidden units, no latent one, a dropout outside ``[0, 1)``.
    """

    name: ClassVar[str] = "dropout-auto-encoder"
    low: Tensor
    span: Tensor
    whole: Tensor
    group: Tensor

    def __init__(self, width: int, hidden: int = 16, latent: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        if width < 1 or hidden < 2 or latent < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"an auto-encoder of rows needs a column, 2 hidden units, 1 latent one and a dropout below 1, got "
                f"{width}, {hidden}, {latent} and {dropout}"
            )
        half = hidden // 2
        self.width, self.dropout = width, float(dropout)
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, half), nn.ReLU())
        self.mean, self.log_var = nn.Linear(half, latent), nn.Linear(half, latent)
        self.decoder = nn.ModuleList([nn.Linear(latent, half), nn.Linear(half, hidden)])
        self.out = nn.Linear(hidden, width)
        self.register_buffer("low", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("span", torch.ones(width, dtype=torch.float32))
        self.register_buffer("whole", torch.zeros(width, dtype=torch.bool))
        self.register_buffer("group", torch.arange(width))
        self.spec = ModelSpec(
            self.name, {"width": width, "hidden": hidden, "latent": latent, "dropout": float(dropout)}
        )

    @torch.no_grad()
    def scale(self, rows: Tensor) -> DropoutAutoEncoder:
        """Take range, whole numbers and categories of the columns from rows ``[N, D]``: before training."""
        self.low.copy_(rows.amin(0))
        self.span.copy_(torch.where(rows.amax(0) > rows.amin(0), rows.amax(0) - rows.amin(0), 1.0))
        self.whole.copy_((rows == rows.round()).all(0))
        self.group.copy_(torch.from_numpy(groups_of(rows.cpu().double().numpy())))
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows ``[B, D]`` scaled, logits of the decoded ones, mean and log variance of the codes."""
        scaled = clipped((x - self.low) / self.span)
        features = self.encoder(scaled)
        mean = self.mean(features)
        return scaled, self._decoded(mean), mean, self.log_var(features)

    @torch.no_grad()
    def drawn(self, rows: Tensor, each: int, generator: torch.Generator) -> Tensor:
        """``[n, each, D]`` in the data's units: decoded under so many dropouts.

        Whole numbers are rounded, and of the columns of one category the likeliest is 1.

        Args:
            rows: ``[n, D]``.
            each: rows made for every one of them.
            generator: of the dropout, on the CPU.
        """
        code = self.mean(self.encoder(clipped((rows - self.low) / self.span)))
        made = self._decoded(code[:, None].expand(-1, each, -1), generator).sigmoid()
        for group in self.group.unique().tolist():
            columns = torch.nonzero(self.group == group)[:, 0]
            if len(columns) > 1:
                made[..., columns] = F.one_hot(made[..., columns].argmax(-1), len(columns)).to(made.dtype)
        made = made * self.span + self.low
        return torch.where(self.whole, made.round(), made)

    def _decoded(self, code: Tensor, generator: torch.Generator | None = None) -> Tensor:
        features = code
        for layer in self.decoder:
            features = layer(features).relu()
            if generator is None:
                features = F.dropout(features, self.dropout, self.training)
            else:
                kept = torch.rand(features.shape, generator=generator, dtype=torch.float32) >= self.dropout
                features = features * kept.to(features.device) / (1 - self.dropout)
        decoded: Tensor = self.out(features)
        return decoded


PARTS.register(DropoutAutoEncoder.name, paper="Miok et al. 2019; Vres and Robnik-Sikonja 2022")(DropoutAutoEncoder)


@dataclass(frozen=True)
class VariationalLoss:
    """Cross-entropy of the scaled columns, summed, and the divergence of the code from the normal distribution."""

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the auto-encoder, perhaps wrapped for data-parallel training."""
        scaled, decoded, mean, log_var = module(x)
        restored = F.binary_cross_entropy_with_logits(decoded, scaled, reduction="none").sum(1)
        losses: Tensor = restored - 0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1)
        return losses


def groups_of(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each column of ``[N, D]`` its group: neighbouring columns of 0 and 1 that add up to 1 in every row are one.

    These are a category's; any other column is a group of its own.
    """
    flags = ((rows == 0) | (rows == 1)).all(0)
    found, column = np.zeros(rows.shape[1], dtype=np.int64), 0
    for group in range(rows.shape[1]):
        if column == rows.shape[1]:
            break
        end = column + 1
        total = rows[:, column].copy()
        while end < rows.shape[1] and flags[column : end + 1].all() and (total < 1).any():
            total += rows[:, end]
            end += 1
        if not (total == 1).all() or end == column + 1:
            end = column + 1
        found[column:end] = group
        column = end
    return found
