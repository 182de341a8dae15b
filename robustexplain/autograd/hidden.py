"""Models whose modules and function calls cannot be seen: compiled, scripted, traced, exported, or spread over devices.

Hooks and function modes miss what runs inside them, so a method that looks inside a model would fail, or silently
change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..errors import UnsupportedModelError

_COMPILED = "was compiled by torch.compile"
_WRAPPERS = {
    "OptimizedModule": (_COMPILED, "its _orig_mod"),
    "ScriptModule": ("is TorchScript (scripted or traced)", "the module that it was made from"),
    "DistributedDataParallel": ("is spread over processes", "its .module"),
    "FullyShardedDataParallel": ("has weights that are spread over processes", "its .module, unsharded"),
    "FSDPModule": ("has weights that are spread over processes", "one that is not sharded"),
}
_BY_TYPE: dict[type, tuple[str, str] | None] = {nn.DataParallel: None}


def hidden(model: nn.Module) -> str | None:
    """Why the modules of a model, or of a part of it, cannot be seen, and what to pass; ``None`` if they can."""
    for name, module in _walk(model):
        found = _reason(module)
        if found is not None:
            part = f"its part {name!r}" if name else "it"
            return f"{part} {found[0]}: pass the plain model, {found[1]}" + (f", as {name!r}" if name else "")
    return None


def refuse_hidden(model: nn.Module, purpose: str) -> None:
    """Refuse a model whose modules cannot be seen.

    Args:
        model: the model.
        purpose: what looks at them, such as ``Grad-CAM reads a layer``.

    Raises:
        UnsupportedModelError: with the reason, and what to pass.
    """
    found = hidden(model)
    if found is not None:
        raise UnsupportedModelError(f"{purpose}, which is hidden in this {type(model).__name__}: {found}")


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # Several times as fast as named_modules, since it runs in every call: a module in two places is looked at twice.
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        prefix = f"{name}." if name else ""
        waiting += [(prefix + key, child) for key, child in module._modules.items() if child is not None]


def _reason(module: nn.Module) -> tuple[str, str] | None:
    own = type(module)
    if own not in _BY_TYPE:
        _BY_TYPE[own] = next((_WRAPPERS[c.__name__] for c in own.__mro__ if c.__name__ in _WRAPPERS), None)
    found, state = _BY_TYPE[own], module.__dict__
    if found is not None:
        return found
    if state.get("_compiled_call_impl") is not None:
        return _COMPILED, "as it was before its compile()"
    if "forward" in state and hasattr(state["forward"], "_torchdynamo_orig_callable"):
        return _COMPILED, "with its own forward"
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return "is spread over devices", "its .module"
    if isinstance(module, torch.fx.GraphModule) and _of_operators(module):
        return "was exported (torch.export)", "the module that it was made from"
    return None


def _of_operators(module: torch.fx.GraphModule) -> bool:
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)
