"""DeepLIFT: differences from a baseline, propagated back through the network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...autograd.tape import Call, Tape, record
from ...errors import UnsupportedModelError
from ...registry import INTERPRETERS
from ..base import Channels, Explanation, Interpreter, explained_class, reduce_channels, requiring_grad
from ..gradients.baselines import Baseline, baseline_like, checked_baseline


@INTERPRETERS.register("deeplift", paper="Shrikumar et al. 2017, section 3.5.1 (rescale rule)", needs=("known layers",))
@dataclass(frozen=True, eq=False)
class DeepLIFT(Interpreter):
    """DeepLIFT with the rescale rule: ``(x - baseline)`` times the slope between the two, activation by activation.

    Maps sum to ``f_c(x) - f_c(baseline)``. Max pooling shares the difference of its maxima between the two positions,
    as captum does. Where an activation's input hardly differs from the baseline's, the slope is its derivative.
    Costs one more forward pass, on the baseline alone.

    Args:
        baseline: the reference: one number for every channel or column, in ``[0, 1]``; ``mean``, what the model's own
            normalisation takes for zero; or a number for each channel or column, in the data's own units.
        channels: how channels become one map; only the signed sum keeps completeness.

    Raises:
        UnsupportedModelError: on the first input, for a model with an operation that is neither linear nor elementwise
            (attention, layer norm, products of activations), where the rule does not hold.
    """

    baseline: Baseline = 0.0
    channels: Channels = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "baseline", checked_baseline(self, self.baseline))

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x)
        tape = record(self.model, x)
        start = baseline_like(self.baseline, self.model, x.detach())
        reference = record(self.model, start.clone().requires_grad_())
        _require_same(tape, reference)
        classes = explained_class(tape.logits, target)
        slopes = _Slopes(reference, graph)
        attribution = (x - start) * tape.backward(tape.start_at(classes), slopes.rule)
        return Explanation(tape.logits, reduce_channels(attribution, self.channels))


class _Slopes:
    """Multipliers of every step between the input and the baseline."""

    def __init__(self, reference: Tape, graph: bool) -> None:
        self.reference, self.graph = reference, graph

    def rule(self, step: Call, at_outputs: list[Tensor]) -> list[Tensor | None]:
        """Multipliers of a step's sources from those of its outputs."""
        if step.kind == "activation":
            rest = len(step.sources) - 1
            return [self._activation(step, self.reference.steps[step.index], at_outputs), *[None] * rest]
        if step.kind == "max_pool":
            return [self._max_pool(step, self.reference.steps[step.index], at_outputs[0])]
        if step.kind == "unknown" or (step.kind == "linear" and len(step.sources) > 1):
            raise UnsupportedModelError(
                f"DeepLIFT's rescale rule does not hold for {step.name!r}, which this model applies to its "
                "activations; use IntegratedGradients, which is complete for any model"
            )
        return list(step.vjp(at_outputs, self.graph))

    def _activation(self, step: Call, reference: Call, at_outputs: list[Tensor]) -> Tensor:
        dx = step.sources[0].value - reference.sources[0].value
        dy = step.outputs[0] - reference.outputs[0]
        ends = (step.sources[0].value, reference.sources[0].value, step.outputs[0], reference.outputs[0])
        near = _too_close(dx, *ends)
        slope = dy / torch.where(near, 1, dx)
        return torch.where(near, step.vjp(at_outputs, self.graph)[0], at_outputs[0] * slope)

    def _max_pool(self, step: Call, reference: Call, at_output: Tensor) -> Tensor:
        x = step.sources[0].value
        base = reference.sources[0].value.expand_as(x)
        base = base if base.requires_grad else base.detach().requires_grad_()
        # Two positions share max(x) - max(baseline), split at the larger maximum: the largest input and baseline pixel.
        larger = torch.maximum(step.outputs[0], reference.outputs[0])
        input_part = step.vjp([at_output * (larger - reference.outputs[0])], self.graph)[0]
        pooled = step.call({0: base})
        (baseline_part,) = torch.autograd.grad(
            pooled, base, at_output * (step.outputs[0] - larger), create_graph=self.graph
        )
        dx = x - base
        # The shares are at most 1 whatever the difference: only a division by zero is kept out.
        near = dx.abs() <= torch.finfo(dx.dtype).tiny
        slope = (input_part + baseline_part) / torch.where(near, 1, dx)
        return torch.where(near, step.vjp([at_output], self.graph)[0], slope)


def _too_close(dx: Tensor, *ends: Tensor) -> Tensor:
    """Where the derivative is closer to the slope than the ratio of differences is: bool, like ``dx``.

    Rounding moves the ratio by about ``eps |v| / |dx|``, ``v`` the larger of inputs and outputs at both ends, and the
    derivative at one end is off by about ``|dx|``, in units of ``v``: a network of any scale has the same places.
    """
    with torch.no_grad():
        size = ends[0].abs()
        for end in ends[1:]:
            size = torch.maximum(size, end.abs())
        near: Tensor = dx.abs() <= size * math.sqrt(torch.finfo(dx.dtype).eps)
    return near


def _require_same(tape: Tape, reference: Tape) -> None:
    if [step.name for step in tape.steps] != [step.name for step in reference.steps]:
        raise UnsupportedModelError("DeepLIFT needs a model that takes the same path for the input and the baseline")
