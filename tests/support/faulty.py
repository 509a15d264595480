"""A method of an open node that fails at its n-th call."""

from __future__ import annotations

import threading
from typing import Any

from byre.errors import IOFailure
from byre.graph.node import Node

__all__ = ["faulty"]


class faulty:
    """From now on the ``nth`` call of ``method`` of ``node`` fails, until :meth:`undo`."""

    def __init__(self, node: Node, method: str, nth: int) -> None:
        self._node, self._method = node, method
        self._lock = threading.Lock()
        original = getattr(node, method)
        self.left = nth

        def fails(*given: Any, **more: Any) -> Any:
            with self._lock:
                self.left -= 1
                hit = self.left == 0
            if hit:
                raise IOFailure(f"{method} fails, for a test", where=node.filename)
            return original(*given, **more)

        setattr(node, method, fails)

    def undo(self) -> None:
        delattr(self._node, self._method)
