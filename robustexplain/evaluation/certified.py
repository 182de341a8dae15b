"""What a cell reports of certificates: how much is certified, and whether attacked inputs keep to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interpreters import Certificate
from ..metrics import Cell

SHARES = ("certified_one", "certified_zero", "certified_overlap", "certified_radius")
"""What a row's certificates of benign inputs say, one a sample."""


def certified(cell: Cell) -> dict[str, Tensor]:
    """Figures of a chunk's certificates, ``[B]``; nothing where the system gives none.

    ``contradicted``: of the cells that the benign input's certificate decides, the share that the attacked input's
    decides the other way; ``attacked_overlap``: of its certified top, the share that stays; both are NaN for an
    attacked input of which the certificate says nothing: beyond its radius, or with another prediction where it holds
    for one class.
    """
    benign, seen = cell.benign.certificate, cell.seen.certificate
    if benign is None or seen is None:
        return {}
    distance = (cell.attacked - cell.clean).flatten(1).float().norm(dim=1)
    # A radius of 0 is of the input alone, which an attack that changes nothing leaves as it is.
    beyond = distance.cpu() > benign.radius * (1 + 1e-6)
    if benign.same_class:
        beyond |= (cell.seen.prediction != cell.benign.prediction).cpu()
    found = benign.shares()
    if benign.decided is not None:
        found["contradicted"] = benign.contradicted(seen).cpu().masked_fill(beyond, torch.nan)
    if benign.overlap is not None:
        found["attacked_overlap"] = benign.overlap_with(seen).float().cpu().masked_fill(beyond, torch.nan)
    pictures = {"certificate": benign, "attacked_certificate": seen}
    return found | {name: drawn(one, cell.clean) for name, one in pictures.items() if one.decided is not None}


def drawn(certificate: Certificate, x: Tensor) -> Tensor:
    """The decisions of a certificate for each pixel of ``x``: float ``[B, H, W]`` of 1, 0 and -1."""
    assert certificate.decided is not None  # asked before; for the type checker
    return F.interpolate(certificate.decided[:, None].float(), size=x.shape[-2:], mode="nearest")[:, 0]
