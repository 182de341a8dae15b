"""What a saved classifier answered on two made-up images: shows on loading that it still computes the same.

Weights alone do not tell a module from another with the same layers: what it does to its input, functions that it calls
and hooks have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import evaluating
from ..data.inputs import InputSpec
from ..door import answer, suited
from ..errors import InputError
from ..random_streams import generator

LOGITS = "probe.logits"
SAME = 1e-3
"""By how much two looks at the same images may differ, on kernels that add up in another order each time."""
TOLERANCE, HALF = 0.02, 0.1
"""By how much logits may differ, as a share of the largest, and those of half precision: devices round otherwise."""


def asked(component: Any) -> dict[str, Tensor]:
    """The classifier's answers, to be stored; empty where the size of its images is not known, or it draws."""
    spec, model = getattr(component, "inputs", None), getattr(component, "model", None)
    if not isinstance(spec, InputSpec) or spec.size is None or model is None:
        return {}
    try:
        evaluating(model)
        first, second = (_answers(model, spec) for _ in range(2))
    except (InputError, RuntimeError):  # one that is not deployed as it is, or takes no images of this size
        return {}
    return {LOGITS: first.cpu()} if _gap(first, second) <= SAME and bool(torch.isfinite(first).all()) else {}


def compare(component: Any, stored: dict[str, Tensor], source: str) -> None:
    """Refuse a loaded classifier that answers otherwise than the saved one did.

    Raises:
        InputError: by how much.
    """
    wanted = stored.get(LOGITS)
    if wanted is None:
        return
    try:
        found = _answers(component.model, component.inputs).cpu()
    except RuntimeError as error:
        size = list(component.inputs.size)
        raise InputError(f"the classifier refuses images of {size}, which the saved one took: {error}") from error
    apart = 1.0 if found.shape != wanted.shape else _gap(found, wanted)
    if apart > (HALF if wanted.dtype in (torch.float16, torch.bfloat16) else TOLERANCE):
        raise InputError(
            f"the {type(component.model).__name__} answers otherwise than the one that was saved in {source}, with the "
            f"same weights: logits of two made-up images differ by {apart:.0%} of the largest. Does it treat its input "
            "as the saved one did (normalisation, size), and are its activations, hooks and library versions the same?"
        )


@torch.no_grad()
def _answers(model: Any, spec: InputSpec) -> Tensor:
    assert spec.size is not None
    x = torch.rand(2, spec.channels, *spec.size, generator=generator(0, "probe"), dtype=torch.float32)
    return answer(model, suited(model, x))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float().to(a.device)).abs().max() / b.float().abs().max().clamp(min=1e-12))
