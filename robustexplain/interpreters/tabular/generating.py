"""Fitting the generators of rows for focused sampling: by a defense, or by an adversary who knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.utils.data import TensorDataset

from ...errors import FieldError, InputError
from ...fields import Count, Fraction, check_fields
from ...files import digest_tensors
from ...random_streams import derive
from ...training import Samples, Session, Training, fit
from ..reference import Reference
from .auto_encoder import DropoutAutoEncoder, VariationalLoss
from .base import drawn_rows
from .generators import AutoEncoderRows, NeighbourRows, RandomTrees, RowGenerator, TreeRows


@dataclass(frozen=True)
class RowGenerating:
    """How rows that look like the data's are made.

    Args:
        kind: ``mcd-vae`` (an auto-encoder with dropout, trained), ``trees`` (values of real rows that share a leaf of a
            random tree) or ``neighbours`` (real rows; in KernelSHAP the nearest in each coalition's columns, so that
            its values are conditional).
        size: rows that KernelSHAP draws for each row that it explains; the authors' code takes 100.
        rows: largest number of rows of the data that are used.
        hidden: ``mcd-vae``: units of the layer next to the rows.
        latent: ``mcd-vae``: of the code; ``None``: half the columns, as in the authors' code.
        dropout: ``mcd-vae``: share of the decoder's units that is dropped.
        training: ``mcd-vae``: epochs, batch, optimiser.
        trees: ``trees``: how many.
        leaf: ``trees``: rows that a leaf holds at least.
        nearest: ``neighbours``: LIME draws from so many rows; ``None``: from all.
    """

    kind: Literal["mcd-vae", "trees", "neighbours"] = "mcd-vae"
    size: Count = 100
    rows: Count = 10_000
    hidden: Count = 16
    latent: Count | None = None
    dropout: Fraction = 0.3
    training: Training = field(
        default_factory=lambda: Training(epochs=100, batch_size=100, lr=1e-3, schedule="constant", clip=0.0)
    )
    trees: Count = 100
    leaf: Count = 20
    nearest: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden < 2:
            raise FieldError(type(self).__name__, "hidden", f"must be at least 2, got {self.hidden!r}")
        if self.dropout >= 1:
            raise FieldError(type(self).__name__, "dropout", f"must be below 1, got {self.dropout!r}")

    @property
    def fewest(self) -> int:
        """How many rows it takes at least."""
        return {"mcd-vae": 2, "trees": self.leaf, "neighbours": max(self.size, self.nearest or 1)}[self.kind]

    def fitted(self, data: Samples, seed: int, session: Session | None = None) -> RowGenerator:
        """The generator, fitted to rows of ``data``.

        Args:
            data: map-style, gives ``(x [D], label)``; labels do not count.
            seed: of the rows, of weights and trees.
            session: accelerator, checkpoints, progress.

        Raises:
            InputError: samples that are not table rows, or too few.
        """
        if len(data) < self.fewest:
            raise InputError(f"a generator of {self.kind} rows needs {self.fewest} rows at least, got {len(data)}")
        real = drawn_rows(data, self.rows, derive(seed, "generator"))
        if self.kind == "neighbours":
            return NeighbourRows(Reference(real), self.nearest, self.size)
        if self.kind == "trees":
            trees = RandomTrees.fit(real.double().numpy(), self.trees, self.leaf, derive(seed, "trees"))
            return TreeRows(Reference(real), trees, self.size)
        return AutoEncoderRows(self._trained(real, seed, session or Session()), self.size)

    def _trained(self, real: torch.Tensor, seed: int, session: Session) -> DropoutAutoEncoder:
        width = real.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, "auto-encoder") % 2**32)
            network = DropoutAutoEncoder(width, self.hidden, self.latent or max(1, width // 2), self.dropout)
        network = network.scale(real).to(session.device)
        known = [self.hidden, self.latent, self.dropout, digest_tensors({"rows": real})]
        rows = TensorDataset(real, torch.zeros(len(real), dtype=torch.int64))
        fit(network, VariationalLoss(), rows, self.training, name="mcd-vae", seed=seed, session=session, identity=known)
        return network.requires_grad_(False).eval()
