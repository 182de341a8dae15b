"""Restores what captum changes, and finds the likely cause when it fails."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...autograd import layers
from ...autograd.rectifiers import count_rectifiers
from ...door import answer
from ...errors import UnsupportedModelError


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress captum's warnings about the hooks that it sets; they are removed afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\..*")
        yield


@contextmanager
def pristine(model: nn.Module) -> Iterator[None]:
    """Restore the model's modules after the block: hooks, attributes, parameters' data and gradients."""
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    tables = [(t, dict(t)) for _, state in modules for t in state.values() if isinstance(t, dict)]
    parameters = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, state in modules:
            module.__dict__.clear()
            module.__dict__.update(state)
        for table, content in tables:
            table.clear()
            table.update(content)
        for parameter, data, gradient, requires_grad in parameters:
            parameter.data, parameter.grad = data, gradient
            parameter.requires_grad_(requires_grad)


def require_relu_modules(model: nn.Module, x: Tensor, method: str) -> None:
    """Refuse a model with rectifiers that captum's overrides would not change.

    Raises:
        UnsupportedModelError: with the number of all rectifiers and of those that would be changed.
    """
    calls: list[nn.Module] = []
    with layers.hooks([m for m in model.modules() if isinstance(m, nn.ReLU)], lambda module, *_: calls.append(module)):
        total = count_rectifiers(model, x)
    if not total or len(calls) < total:
        raise UnsupportedModelError(
            f"captum's {method} changes the gradient of nn.ReLU modules only; of the {total} rectifiers that "
            f"{type(model).__name__} calls, {len(calls)} are such (ReLU6, functional and fused ones are not): the rest "
            "would silently keep the plain gradient"
        )


@torch.no_grad()
def cause(model: nn.Module, x: Tensor) -> str:
    """What in the model is known to break captum's hooks, as the end of an error message; empty if nothing."""
    names = {module: name for name, module in model.named_modules()}
    leaves = [module for module in names if not list(module.children())]
    uses: Counter[nn.Module] = Counter()
    with layers.hooks(leaves, lambda module, *_: uses.update([module])):
        answer(model, x[:1])
    found = {
        "activations that work in place": [names[m] for m in leaves if getattr(m, "inplace", False)],
        "modules that run more than once": [names[m] for m, n in uses.items() if n > 1],
    }
    causes = [f"{what} ({', '.join(which[:3])}, {len(which)} in all)" for what, which in found.items() if which]
    return f"; the model has {' and '.join(causes)}, which break captum's hooks" if causes else ""
