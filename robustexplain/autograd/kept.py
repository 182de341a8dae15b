"""What was found out about a model, kept for a bounded number of input sizes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

_LOCK = threading.Lock()


class Kept(OrderedDict[Key, Value]):
    """Values by key, the latest 16: users send images of any size, and memory must not grow with their number."""

    most = 16

    def get_or(self, key: Key, find: Callable[[], Value]) -> Value:
        """The value that is kept, otherwise the one that ``find`` gives; two threads may both find it."""
        with _LOCK:
            if key in self:
                self.move_to_end(key)
                return self[key]
        value = find()
        with _LOCK:
            self[key] = value
            while len(self) > self.most:
                self.popitem(last=False)
        return value
