"""Models whose modules and function calls cannot be seen: compiled, scripted, traced, exported, or spread over devices.

Hooks and function modes miss what runs inside them, so a method that looks inside a model would fail, or silently
change nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from .errors import UnsupportedModelError

_COMPILED = "was compiled by torch.compile"
_WRAPPERS = {
    "OptimizedModule": (_COMPILED, "its _orig_mod"),
    "ScriptModule": ("is TorchScript (scripted or traced)", "the module that it was made from"),
    "DistributedDataParallel": ("is spread over processes", "its .module"),
    "FullyShardedDataParallel": ("has weights that are spread over processes", "its .module, unsharded"),
    "FSDPModule": ("has weights that are spread over processes", "one that is not sharded"),
}
_OWN_CALL = frozenset({"_compiled_call_impl", "forward"})
"""Attributes that a module has of its own, not of its class, where its call was compiled or replaced."""
_harmless: dict[type, bool] = {}


def hidden(model: nn.Module) -> str | None:
    """Why the modules of a model, or of a part of it, cannot be seen, and what to pass; ``None`` if they can."""
    if not _suspicious(model):
        return None
    for name, module in model.named_modules():
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


def _suspicious(model: nn.Module) -> bool:
    """Whether a part may be hidden; several times as fast as ``model.modules()``, since it runs in every call."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        own, state = type(module), module.__dict__
        if own not in _harmless:
            _harmless[own] = not issubclass(own, (nn.DataParallel, torch.fx.GraphModule)) and _wrapper(own) is None
        if not (_harmless[own] and _OWN_CALL.isdisjoint(state)):
            return True
        waiting.extend(state["_modules"].values())
    return False


def _wrapper(own: type) -> tuple[str, str] | None:
    return next((_WRAPPERS[c.__name__] for c in own.__mro__ if c.__name__ in _WRAPPERS), None)


def _reason(module: nn.Module) -> tuple[str, str] | None:
    found, state = _wrapper(type(module)), module.__dict__
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
