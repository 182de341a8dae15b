"""Forward hooks that belong to the thread which set them, so that many threads can explain one model.

torch keeps hooks in the module, where the forward passes of every thread run them, and numbers them in a way that is
not safe between threads. Here a hooked module gets one hook of ours, however many threads watch it; that hook runs what
the current thread has asked for, and nothing of another thread's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

After = Callable[[nn.Module, Any, Any], Any]
"""Called with a module, its positional arguments and its output; gives another output, or ``None``."""
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]
"""Called with a module, its positional and its keyword arguments; gives other positional ones, or ``None``."""


class _Table(threading.local):
    """What the current thread has asked for, by module."""

    def __init__(self) -> None:
        self.hooks: dict[nn.Module, list[Callable[..., Any]]] = {}


@dataclass
class _Shared:
    """The one hook of ours in a module, and by how many blocks of all threads it is used."""

    handle: RemovableHandle
    users: int = 0


_before, _after = _Table(), _Table()
_lock = threading.Lock()
_installed: dict[tuple[_Table, nn.Module], _Shared] = {}


@contextmanager
def hooks(modules: Sequence[nn.Module], after: After | None = None, before: Before | None = None) -> Iterator[None]:
    """Hooks on the forward passes that this thread runs in the block; removed afterwards, also after an exception.

    Args:
        modules: whose forward passes.
        after: runs behind them; what it gives, unless ``None``, replaces the output.
        before: runs in front of them; what it gives, unless ``None``, replaces the positional arguments.
    """
    added: list[tuple[_Table, nn.Module, Callable[..., Any]]] = []
    try:
        for table, hook in ((_before, before), (_after, after)):
            for module in modules if hook is not None else ():
                _install(table, module)
                assert hook is not None  # no hook, no module; for the type checker
                added.append((table, module, hook))
                table.hooks.setdefault(module, []).append(hook)
        yield
    finally:
        for table, module, hook in reversed(added):
            _forget(table.hooks, module, hook)
            _uninstall(table, module)


def copy_with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same parameters and buffers, for code that changes modules while it runs."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    with _lock:
        return copy.deepcopy(model, shared)


def _forget(table: dict[nn.Module, list[Callable[..., Any]]], module: nn.Module, hook: Callable[..., Any]) -> None:
    # Blocks mostly end in the reverse order of their begin, but not those in two generators.
    found = table[module]
    del found[max(i for i, own in enumerate(found) if own is hook)]
    if not found:
        del table[module]


def _install(table: _Table, module: nn.Module) -> None:
    with _lock:
        shared = _installed.get((table, module))
        if shared is None:
            _drop_copied(module)
            shared = _installed[table, module] = _Shared(
                module.register_forward_hook(_run_after)
                if table is _after
                else module.register_forward_pre_hook(_run_before, with_kwargs=True)
            )
        shared.users += 1


def _drop_copied(module: nn.Module) -> None:
    """Take out hooks of ours that came with a copy of a hooked module: with another one they would run twice."""
    for own, known, ours in (
        (_before, module._forward_pre_hooks, _run_before),
        (_after, module._forward_hooks, _run_after),
    ):
        if (own, module) not in _installed:
            for key in [key for key, hook in known.items() if hook is ours]:
                del known[key]


def _uninstall(table: _Table, module: nn.Module) -> None:
    with _lock:
        shared = _installed[table, module]
        shared.users -= 1
        if not shared.users:
            del _installed[table, module]
            shared.handle.remove()


def _run_before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = args
    for hook in tuple(_before.hooks.get(module, ())):
        changed = hook(module, args, kwargs)
        args = args if changed is None else changed
    return None if args is given else (args, kwargs)


def _run_after(module: nn.Module, args: Any, output: Any) -> Any:
    for hook in tuple(_after.hooks.get(module, ())):
        changed = hook(module, args, output)
        output = output if changed is None else changed
    return output
