"""A tape of one forward pass, and a backward pass along it in which a method chooses the rule of every step.

Relevance propagation, DeepLIFT and guided backpropagation are backward passes with rules of their own. Hooks and custom
autograd functions can run them, but then the *second* derivative follows the altered rules too, and the gradients of
maps are wrong without any error. Here the forward pass is recorded as the function calls that it makes, so modules,
functional calls, in-place forms and fused layers are treated alike. The backward pass is ordinary differentiable
arithmetic on the recorded values: the derivative of a map by input or weights is exact, whatever the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..door import checked, in_place
from ..errors import UnsupportedModelError
from ..hidden import refuse_hidden
from ..single_image import ordered
from .hooks import hooks
from .layers import submodule
from .rectifiers import is_in_place, is_rectifier
from .second_derivatives import attention

OpKind = Literal[
    "linear", "batch_norm", "activation", "identity", "affine", "shape", "max_pool", "average", "sum", "unknown"
]

_FUNCTIONS: dict[OpKind, str] = {
    "linear": "conv1d conv2d conv3d linear",
    "batch_norm": "batch_norm",
    "activation": "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign sigmoid logsigmoid "
    "tanh hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink threshold",
    "identity": "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout clone contiguous to float "
    "double half bfloat16 type_as positive pos alias",
    "shape": "flatten unflatten reshape reshape_as view view_as permute transpose swapaxes movedim squeeze unsqueeze "
    "cat concat concatenate stack chunk split tensor_split unbind getitem narrow select index_select pad expand "
    "expand_as roll flip channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle t T mT "
    "repeat_interleave masked_fill",
    "max_pool": "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d",
    "average": "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d mean sum",
}
_KINDS: dict[str, OpKind] = {name: kind for kind, names in _FUNCTIONS.items() for name in names.split()}
_SUMS = {"add", "sub", "subtract", "radd", "rsub", "iadd", "isub"}
_SCALES = {"mul", "multiply", "rmul", "imul", "div", "divide", "true_divide", "truediv", "itruediv", "neg", "negative"}
_READS_METADATA_OF_OTHERS = {"to", "type_as", "view_as", "expand_as", "reshape_as"}
"""Calls that read only the dtype or the shape of all arguments but the first."""


@dataclass(frozen=True)
class Source:
    """Where an argument of a step came from: the step that computed it, which of its outputs, and the value itself."""

    step: Call
    output: int
    value: Tensor


@dataclass(eq=False, repr=False)
class Call:
    """One function call of the forward pass.

    Args:
        name: the function's bare name, such as ``conv2d``; ``input`` for the input itself.
        func: the function.
        args: its positional arguments, recorded values in place of the tensors it was called with.
        kwargs: its keyword arguments, likewise.
        sources: its recorded tensor arguments, in order.
        outputs: the tensors that it returned.
        index: its place on the tape.
        versions: the version counters of the sources when the call was made.
        users: how many later calls use one of its outputs.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[Source]
    outputs: list[Tensor]
    index: int
    versions: list[int] = field(default_factory=list)
    users: int = 0

    def __repr__(self) -> str:
        return f"Call({self.index}: {self.name})"

    @property
    def kind(self) -> OpKind:
        """What the step does to its values, which is what a rule depends on."""
        if self.rectifies:
            return "activation"
        if self.name in _SUMS:
            return "sum" if len(self.sources) > 1 else "affine"
        if self.name in _SCALES:
            return "affine" if len(self.sources) == 1 and self._scales_its_source() else "unknown"
        return _KINDS.get(self.name, "unknown")

    @property
    def rectifies(self) -> bool:
        """Whether the step is a rectifier of the model."""
        return is_rectifier(self.func, self.args, self.kwargs)

    def _scales_its_source(self) -> bool:
        # A constant divided by a value is no scaling.
        return "div" not in self.name or (bool(self.args) and self.args[0] is self.sources[0].value)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call, given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def call(self, replaced: dict[int, Tensor]) -> Any:
        """Make the same call with other values for some sources (by their position)."""
        swap = {id(self.sources[i].value): value for i, value in replaced.items()}

        def substitute(value: Any) -> Any:
            return swap.get(id(value), value)

        return self.func(*tree_map(substitute, self.args), **tree_map(substitute, self.kwargs))

    def vjp(self, at_outputs: Sequence[Tensor], graph: bool) -> list[Tensor]:
        """The ordinary vector-Jacobian product: one tensor a source, from one tensor an output."""
        values = [source.value for source in self.sources]
        gradients = torch.autograd.grad(
            self.outputs,
            values,
            [ordered(value) for value in at_outputs],
            create_graph=graph,
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]


@dataclass(frozen=True)
class Tape:
    """A recorded forward pass.

    Args:
        steps: the calls in the order they were made; the first is the input.
        logits: ``[B, K]``.
        last: the step that computed the logits, and which of its outputs they are.
        layers: the same for the outputs of the named modules.
    """

    steps: list[Call]
    logits: Tensor
    last: tuple[Call, int]
    layers: dict[str, tuple[Call, int]]

    def start_at(self, classes: Tensor) -> Tensor:
        """What a backward pass from the logits of ``classes`` ``[B]`` starts with: 1 there, 0 elsewhere, ``[B, K]``."""
        return F.one_hot(classes.long(), self.logits.shape[1]).to(self.logits)

    def backward(
        self,
        start: Tensor,
        rule: Callable[[Call, list[Tensor]], list[Tensor | None]],
        stop: tuple[Call, int] | None = None,
    ) -> Tensor:
        """Propagate ``start`` from the logits back to the input (or to ``stop``), by ``rule`` at every step.

        Args:
            start: ``[B, K]``, the values at the logits.
            rule: gives, for a step and the values at its outputs, the values at its sources (``None``: nothing).
            stop: a step and which of its outputs; the pass ends there.

        Raises:
            UnsupportedModelError: if a step used a value that was not recorded, or that was changed in place later.
        """
        end, which = stop or (self.steps[0], 0)
        arrived: dict[tuple[int, int], Tensor] = {(self.last[0].index, self.last[1]): start}
        for step in reversed(self.steps[end.index + 1 :]):
            known = [arrived.pop((step.index, i), None) for i in range(len(step.outputs))]
            if all(value is None for value in known):
                continue
            self._check(step)
            at_outputs = [torch.zeros_like(o) if v is None else v for o, v in zip(step.outputs, known, strict=True)]
            for source, value in zip(step.sources, rule(step, at_outputs), strict=True):
                if value is not None:
                    key = source.step.index, source.output
                    arrived[key] = arrived[key] + value if key in arrived else value
        if (end.index, which) not in arrived:
            raise UnsupportedModelError("the logits do not depend on the layer or input that is explained")
        return arrived[end.index, which]

    def _check(self, step: Call) -> None:
        for source, version in zip(step.sources, step.versions, strict=True):
            if source.value._version != version:
                raise UnsupportedModelError(f"a tensor that {step.name} used is changed in place later in the model")
        recorded = {id(source.value) for source in step.sources}
        read = step.args[:1] if step.name in _READS_METADATA_OF_OTHERS else (step.args, step.kwargs)
        for value in tree_leaves(read):
            unrecorded = isinstance(value, Tensor) and id(value) not in recorded and value.grad_fn is not None
            if unrecorded and _depends(value, self.steps[0].outputs[0]):
                raise UnsupportedModelError(
                    f"an argument of {step.name} was computed from the input unrecorded, by a custom autograd "
                    "function or compiled code: the backward pass would miss it"
                )


def _depends(value: Tensor, x: Tensor) -> bool:
    return torch.autograd.grad(value.sum(), x, retain_graph=True, allow_unused=True)[0] is not None


@dataclass(frozen=True)
class _RecordedTensor:
    """Which step computed a tensor that the model holds, and the tensor's version then."""

    step: Call
    output: int
    tensor: Tensor
    version: int


class _TapeRecorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.given = model, x, x.clone()
        self.version = self.given._version
        self.steps = [Call("input", torch.clone, (), {}, [], [self.given], 0)]
        # By id, which stays unique because every tensor is kept alive.
        entry = _RecordedTensor(self.steps[0], 0, self.given, self.version)
        self.recorded: dict[int, _RecordedTensor] = {id(self.given): entry}

    @property
    def touched(self) -> bool:
        """Whether the input was changed in place, also through ``.data``, which no version tells."""
        return self.given._version != self.version or not torch.equal(self.given, self.x)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled() and not _drops(args, kwargs):
            # Step by step, so that each of its products and its softmax gets a rule.
            with self:
                return attention(*args, **kwargs)[1]
        if not torch.is_grad_enabled():
            # Inside a custom autograd function: what it computes has no graph to differentiate, see Tape._check.
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        target = self._overwritten(func, args, kwargs)
        if target is self.given:
            raise in_place(self.model)
        if target is not None:
            self._protect(target)
        sources: list[Source] = []

        def alias(value: Any) -> Any:
            entry = self.recorded.get(id(value)) if isinstance(value, Tensor) else None
            if entry is None:
                return value
            if entry.tensor._version != entry.version:
                raise UnsupportedModelError(f"{func} uses a tensor whose values were changed through a view of it")
            # A new alias for every use: the derivative by it is that of this one step.
            current = entry.step.outputs[entry.output]
            sources.append(Source(entry.step, entry.output, current.view_as(current)))
            return sources[-1].value

        if _bare(func) in _READS_METADATA_OF_OTHERS:
            traced_args, traced_kwargs = (alias(args[0]), *args[1:]), kwargs
        else:
            traced_args, traced_kwargs = tree_map(alias, args), tree_map(alias, kwargs)
        if not sources:
            return func(*args, **kwargs)
        if target is not None:
            return self._in_place(func, target, traced_args, traced_kwargs, sources)
        result = func(*traced_args, **traced_kwargs)
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        # Without a gradient it is a constant for the backward pass: zeros_like(x), a comparison, an index.
        if outputs and all(isinstance(value, Tensor) and value.requires_grad for value in outputs):
            self._add(Call(_bare(func), func, traced_args, traced_kwargs, sources, outputs, len(self.steps)), outputs)
        return result

    def _overwritten(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The recorded tensor that this call overwrites, if it does."""
        if not is_in_place(func, args, kwargs):
            return None
        target = args[0] if args else kwargs.get("input")
        return target if isinstance(target, Tensor) and id(target) in self.recorded else None

    def _protect(self, target: Tensor) -> None:
        """Keep a copy of the value that is about to be overwritten as the output of the step that computed it."""
        entry = self.recorded[id(target)]
        if entry.step.outputs[entry.output] is target:
            entry.step.outputs[entry.output] = target.clone()

    def _in_place(
        self, func: Any, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], sources: list[Source]
    ) -> Tensor:
        """Compute on a copy of the recorded value, then write the result where the model expects it."""
        scratch = sources[0].value.clone()
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        result: Tensor = func(scratch, *args[1:], **rest)
        target.copy_(result)
        self._add(Call(_bare(func), func, args, kwargs, sources, [result], len(self.steps)), [target])
        return target

    def _add(self, step: Call, results: list[Tensor]) -> None:
        step.versions = [source.value._version for source in step.sources]
        for source in step.sources:
            source.step.users += 1
        self.steps.append(step)
        for i, value in enumerate(results):
            self.recorded[id(value)] = _RecordedTensor(step, i, value, value._version)


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))


def _bare(func: Any) -> str:
    if getattr(func, "__name__", "") == "__get__":
        # A property of a tensor, such as its transpose ``mT``.
        return str(getattr(func.__self__, "__name__", "get"))
    return str(getattr(func, "__name__", func)).strip("_")


def record(model: nn.Module, x: Tensor, layers: Sequence[str] = ()) -> Tape:
    """Run ``model`` on ``x`` once and record every function call that it makes.

    Args:
        model: in eval mode; recording does not change what it computes.
        x: ``[B, C, H, W]``, requires grad.
        layers: dotted names of modules whose outputs are looked up in :attr:`Tape.layers`.

    Raises:
        UnknownNameError: a name that no module has.
        UnsupportedModelError: logits that no recorded call computed; a layer that does not run or gives no tensor.
        InputError: the model answers with something else than logits, or changes its input in place.
    """
    refuse_hidden(model, "the function calls of the forward pass are recorded")
    recorder = _TapeRecorder(model, x)
    found: dict[str, tuple[Call, int]] = {}
    with _marking(model, layers, recorder, found), recorder:
        answer = model(recorder.given)
    if recorder.touched:
        raise in_place(model)
    logits = checked(model, answer, x)
    entry = recorder.recorded.get(id(logits))
    if entry is None:
        raise UnsupportedModelError(
            f"the logits of this {type(model).__name__} were not made by calls that can be seen (custom autograd "
            "functions and compiled code hide theirs): pass the plain model"
        )
    missing = [name for name in layers if name not in found]
    if missing:
        raise UnsupportedModelError(f"layer {missing[0]!r} does not run in a forward pass, or gives no single tensor")
    return Tape(recorder.steps, logits, (entry.step, entry.output), found)


@contextmanager
def _marking(
    model: nn.Module, layers: Sequence[str], recorder: _TapeRecorder, found: dict[str, tuple[Call, int]]
) -> Iterator[None]:
    def mark(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            entry = recorder.recorded.get(id(output)) if isinstance(output, Tensor) else None
            if entry is not None:
                found[name] = entry.step, entry.output

        return hook

    with ExitStack() as stack:
        for name in layers:
            stack.enter_context(hooks([submodule(model, name)], mark(name)))
        yield
