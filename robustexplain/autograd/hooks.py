"""Forward hooks that belong to the thread which set them, so that many threads can explain one model.

torch keeps hooks in the module, where the forward passes of every thread run them, and numbers them in a way that is
not safe between threads. Here a hooked module gets one hook of ours, however many threads watch it; that hook runs what
the current thread has asked for, and nothing of another thread's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

After = Callable[[nn.Module, Any, Any], Any]
"""Called with a module, its positional arguments and its output; gives another output, or ``None``."""
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Called with a module, its positional and its keyword arguments."""


class _Own(threading.local):
    """What this thread has asked for, by module."""

    def __init__(self) -> None:
        self.before: dict[nn.Module, list[Before]] = {}
        self.after: dict[nn.Module, list[After]] = {}


@dataclass
class _Shared:
    """The hooks of ours in a module, and by how many blocks of all threads they are used."""

    handles: tuple[RemovableHandle, ...]
    users: int = 0


_own = _Own()
_lock = threading.Lock()
_installed: dict[nn.Module, _Shared] = {}


@contextmanager
def hooks(modules: Sequence[nn.Module], after: After | None = None, before: Before | None = None) -> Iterator[None]:
    """Hooks on the forward passes that this thread runs in the block; removed afterwards, also after an exception.

    Args:
        modules: whose forward passes.
        after: runs behind them; what it gives, unless ``None``, replaces the output.
        before: runs in front of them.
    """
    with ExitStack() as stack:
        for module in modules:
            _install(module)
            stack.callback(_uninstall, module)
            if before is not None:
                _own.before.setdefault(module, []).append(before)
                stack.callback(_forget, _own.before, module)
            if after is not None:
                _own.after.setdefault(module, []).append(after)
                stack.callback(_forget, _own.after, module)
        yield


def copy_with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same parameters and buffers, for code that changes modules while it runs."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    with _lock:
        return copy.deepcopy(model, shared)


def _forget(table: dict[nn.Module, list[Any]], module: nn.Module) -> None:
    # Blocks end in the reverse order of their begin, so the last hook is this block's.
    table[module].pop()
    if not table[module]:
        del table[module]


def _install(module: nn.Module) -> None:
    with _lock:
        shared = _installed.get(module)
        if shared is None:
            before = module.register_forward_pre_hook(_run_before, with_kwargs=True)
            shared = _installed[module] = _Shared((before, module.register_forward_hook(_run_after)))
        shared.users += 1


def _uninstall(module: nn.Module) -> None:
    with _lock:
        shared = _installed[module]
        shared.users -= 1
        if not shared.users:
            del _installed[module]
            for handle in shared.handles:
                handle.remove()


def _run_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for hook in tuple(_own.before.get(module, ())):
        hook(module, args, kwargs)


def _run_after(module: nn.Module, args: Any, output: Any) -> Any:
    for hook in tuple(_own.after.get(module, ())):
        changed = hook(module, args, output)
        output = output if changed is None else changed
    return output
