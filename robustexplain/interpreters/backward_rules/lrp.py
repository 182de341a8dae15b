"""Layer-wise relevance propagation, differentiable in the input and in the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...autograd.tape import Call, Source, Tape, record
from ...errors import FieldError, InputError, UnsupportedModelError
from ...fields import NonNegative, Positive
from ...models.in_front import in_input_coordinates
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class, requiring_grad
from .lrp_rules import AlphaBeta, BoxRule, Epsilon, Flat, Gamma, LinearLayer, LRPRule, stabilise

STABILISER = 1e-6


_PRODUCTS = {"matmul", "bmm", "einsum"}
_SOFTMAX = {"softmax", "safe_softmax"}
_NORMS = {"layer_norm", "group_norm", "rms_norm"}


@INTERPRETERS.register(
    "lrp",
    paper="Bach et al. 2015; Montavon et al. 2019; Heo et al. 2019 (LRP-T); Achtibat et al. 2024 (attention)",
    needs=("known layers",),
)
@dataclass(frozen=True, eq=False)
class LRP(Interpreter):
    """Layer-wise relevance propagation: the logit is distributed, layer by layer, in proportion to contributions.

    The default is the composite epsilon + z+ (epsilon for fully connected layers, z+ for convolutions). A batch norm
    behind a convolution is folded into it. Other batch norms and activations pass relevance on unchanged; sums
    (residual connections) and averages distribute it in proportion; max pooling passes it to the maximum. The forward
    pass is the model's own. Relevance starts as the value of the logit and is conserved except for what biases and
    stabilisers absorb.

    Attention gets the rules of AttnLRP (Achtibat et al. 2024): a product of two activations gives half to each, in
    proportion to contributions (eq. 14-15); softmax its Taylor expansion at its input, ``R_i = x_i (R_i - s_i sum R)``
    (eq. 13), whose constant term absorbs relevance; layer norms are linear with their deviation as a constant (section
    3.3, where the identity stands for norms without a mean). For transformers the paper
    takes epsilon in fully connected layers and gamma in convolutions: ``conv="gamma"``.

    Args:
        conv: rule of convolutions: ``zplus``, ``epsilon``, ``alphabeta`` or ``gamma``.
        dense: rule of fully connected layers.
        first: rule of the layer that sees the input: ``same`` as the others of its kind, ``flat`` or ``box``
            (the z-B rule; its box is ``[0, 1]`` in the units of the model's own normalisation). All others
            distribute by ``x w``, so pixels near the mean of the normalisation get almost no relevance.
        epsilon: stabiliser of the epsilon rule; all others use 1e-6.
        alpha: weight of positive contributions; ``alpha - beta`` must be 1.
        beta: weight of negative contributions.
        gamma: how much the gamma rule favours positive weights.
        layer: dotted name: relevance at this module's output, summed over channels (LRP-T of Heo et al. 2019,
            section 3.3), in place of the input; only for images.

    Raises:
        UnsupportedModelError: on the first input, for a model with an operation that has no rule (products of
            activations such as squeeze-and-excitation gates; attention of ``nn.MultiheadAttention``).
    """

    conv: Literal["zplus", "epsilon", "alphabeta", "gamma"] = "zplus"
    dense: Literal["zplus", "epsilon", "alphabeta", "gamma"] = "epsilon"
    first: Literal["same", "flat", "box"] = "same"
    epsilon: Positive = 1e-6
    alpha: NonNegative = 2.0
    beta: NonNegative = 1.0
    gamma: NonNegative = 0.25
    layer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise FieldError("LRP", "beta", f"must be alpha - 1, got alpha {self.alpha} and beta {self.beta}")

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        if x.dim() == 2 and self.first == "box":
            raise InputError("LRP's box rule (first='box') is about pixels in [0, 1]; for tables use 'same' or 'flat'")
        x = requiring_grad(x)
        tape = record(self.model, x, [self.layer] if self.layer else [])
        stop = tape.layers[self.layer] if self.layer else None
        classes = explained_class(tape.logits, target)
        relevance = tape.backward(tape.start_at(classes) * tape.logits, _Relevance(self, tape, graph).rule, stop)
        if x.dim() == 2 and not self.layer:
            return Explanation(tape.logits, relevance)
        if relevance.dim() != 4:
            raise UnsupportedModelError(
                f"relevance at layer {self.layer!r} has shape {list(relevance.shape)}; a map needs [B, C, h, w]"
            )
        maps = relevance.sum(1)
        return Explanation(tape.logits, in_input_coordinates(self.model, maps, x) if self.layer else maps)

    def rule_of(self, name: str) -> LRPRule:
        """The rule called ``name``, with this interpreter's settings."""
        rules: dict[str, LRPRule] = {
            "epsilon": Epsilon(self.epsilon),
            "zplus": AlphaBeta(1.0, 0.0, STABILISER),
            "alphabeta": AlphaBeta(self.alpha, self.beta, STABILISER),
            "gamma": Gamma(self.gamma, STABILISER),
            "flat": Flat(STABILISER),
            "box": BoxRule(STABILISER),
        }
        return rules[name]


class _Relevance:
    """The rules of one backward pass: which rule each step gets."""

    def __init__(self, method: LRP, tape: Tape, graph: bool) -> None:
        self.method, self.graph = method, graph
        self.unweighted = _unweighted(tape)
        self.norms = _following_norms(tape)

    def rule(self, step: Call, at_outputs: list[Tensor]) -> list[Tensor | None]:
        """Relevance of a step's sources from that of its outputs."""
        kind = step.kind
        if step.name in _PRODUCTS and len(step.sources) == 2:
            shares = step.vjp([at_outputs[0] / (2 * stabilise(step.outputs[0], STABILISER))], self.graph)
            return [source.value * share for source, share in zip(step.sources, shares, strict=True)]
        if step.name in _SOFTMAX:
            return [_softmax(step, at_outputs[0])]
        if step.name in _NORMS:
            return [_norm(step, at_outputs[0]), *[None] * (len(step.sources) - 1)]
        if kind in ("activation", "identity", "affine", "batch_norm"):
            passed: list[Tensor | None] = [at_outputs[0].sum_to_size(step.sources[0].value.shape)]
            return passed + [None] * (len(step.sources) - 1)
        if kind == "linear" and len(step.sources) == 1:
            return [self._linear(step, at_outputs[0])]
        if kind in ("shape", "max_pool"):
            return list(step.vjp(at_outputs, self.graph))
        if kind in ("average", "sum"):
            shares = step.vjp([at_outputs[0] / stabilise(step.outputs[0], STABILISER)], self.graph)
            return [source.value * share for source, share in zip(step.sources, shares, strict=True)]
        raise UnsupportedModelError(
            f"LRP has no rule for {step.name!r}, which this model applies to its activations; use a gradient method, "
            "such as IntegratedGradients, or GradCAM"
        )

    def _linear(self, step: Call, relevance: Tensor) -> Tensor:
        method, source = self.method, step.sources[0]
        weight, bias = step.argument(1, "weight"), step.argument(2, "bias")
        if step.index in self.norms:
            weight, bias = _fold(self.norms[step.index], weight, bias)
        layer = LinearLayer(_function(step), source.value, weight, bias)
        first = method.first if source.step.index in self.unweighted else "same"
        if first == "box":
            low, high = (_constant_at(source, end) for end in (0.0, 1.0))
            layer = replace(layer, low=torch.minimum(low, high), high=torch.maximum(low, high))
        name = first if first != "same" else method.dense if step.name == "linear" else method.conv
        return method.rule_of(name)(layer, relevance, self.graph)


def _softmax(step: Call, relevance: Tensor) -> Tensor:
    """``x_i (R_i - s_i sum_j R_j)`` (Achtibat et al. 2024, eq. 13); nothing where ``x`` is masked out."""
    x, s = step.sources[0].value, step.outputs[0]
    dim = step.argument(1, "dim")
    moved = relevance - s * relevance.sum(dim, keepdim=True)
    return torch.where(torch.isfinite(x), x, 0) * moved


def _norm(step: Call, relevance: Tensor) -> Tensor:
    """Relevance through ``(x - mean) w / deviation + b`` with a constant deviation (Achtibat et al. 2024, 3.3)."""
    x, scaled = step.sources[0].value, relevance / stabilise(step.outputs[0], STABILISER)
    weight, groups, eps = step.argument(2, "weight"), 1, step.argument(3 if step.name == "rms_norm" else 4, "eps")
    if step.name == "group_norm":
        groups = step.argument(1, "num_groups")
        start = 1
        weight = None if weight is None else weight.reshape(-1, *[1] * (x.dim() - 2))
    else:
        start = x.dim() - len(step.argument(1, "normalized_shape"))
    scaled = scaled if weight is None else scaled * weight
    shape = (*x.shape[:start], groups, -1)
    rows, scaled = x.reshape(shape), scaled.reshape(shape)
    if eps is None:
        eps = torch.finfo(x.dtype).eps if step.name == "rms_norm" else 1e-5
    if step.name == "rms_norm":
        shared = scaled * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    else:
        shared = scaled * (rows.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        shared = shared - shared.mean(-1, keepdim=True)
    found: Tensor = x * shared.reshape(x.shape)
    return found


def _unweighted(tape: Tape) -> set[int]:
    """Indices of the input and of the steps that compute only a normalisation, a reshape or padding of it."""
    raw = {0}
    for step in tape.steps[1:]:
        if step.kind in ("affine", "identity", "shape") and all(s.step.index in raw for s in step.sources):
            raw.add(step.index)
    return raw


def _following_norms(tape: Tape) -> dict[int, Call]:
    """The batch norms that can be folded, by the index of the linear layer in front of them."""
    found = {}
    for step in tape.steps:
        if step.kind != "batch_norm":
            continue
        if step.argument(5, "training", False):
            raise UnsupportedModelError("a batch norm uses the statistics of the batch: samples are not independent")
        before = step.sources[0].step
        if before.kind == "linear" and before.users == 1:
            found[before.index] = step
    return found


def _fold(norm: Call, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one linear layer that equals the layer and its batch norm."""
    mean, variance = norm.argument(1, "running_mean"), norm.argument(2, "running_var")
    gain, shift = norm.argument(3, "weight"), norm.argument(4, "bias")
    scale = (variance + norm.argument(7, "eps", 1e-5)).rsqrt() * (1.0 if gain is None else gain)
    moved = (-mean if bias is None else bias - mean) * scale + (0.0 if shift is None else shift)
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), moved


def _function(step: Call) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A linear step as a function of input, weight and bias."""
    options = {name: value for name, value in step.kwargs.items() if name not in ("input", "weight", "bias")}

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = step.func(x, weight, bias, *step.args[3:], **options)
        return result

    return apply


def _constant_at(source: Source, value: float) -> Tensor:
    """The value of ``source`` for an input that is ``value`` everywhere."""
    step = source.step
    if step.index == 0:
        return torch.full_like(step.outputs[0], value)
    found = step.call({i: _constant_at(inner, value).clone() for i, inner in enumerate(step.sources)})
    result: Tensor = found[source.output] if isinstance(found, (tuple, list)) else found
    return result.detach()
