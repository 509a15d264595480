"""Requests of an open node that fail, n-th by n-th."""

from __future__ import annotations

import threading

from byre.graph.node import Node


class Failing:
    """Makes one kind of request of a node fail from the n-th call on, or that one only, until :meth:`mend`.

    :param least: requests with buffers shorter than this are not counted: metadata, for one
    """

    def __init__(self, node: Node, method: str, at: int, error: Exception, *, once: bool = False,
                 least: int = 0) -> None:  # fmt: skip
        self.calls = 0
        self._node, self._method = node, method
        self._lock = threading.Lock()
        original = getattr(node, method)

        def failing(*arguments: object) -> object:
            if least and len(arguments[1]) < least:  # type: ignore[arg-type]
                return original(*arguments)
            with self._lock:
                self.calls += 1
                hit = self.calls == at if once else self.calls >= at
            if hit:
                raise error
            return original(*arguments)

        setattr(node, method, failing)

    def mend(self) -> None:
        delattr(self._node, self._method)
