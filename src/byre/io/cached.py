"""Short cuts for formats: reads that take no waiting, and where in a file a range lies.

For whoever answers many small requests and has its own way for all others (:mod:`byre.nbd.transmission`). A format
takes part by ``cached_host``.
"""

from __future__ import annotations

from ..typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..formats.base import FormatNode

__all__ = ["direct_range", "file_range", "read_cached"]


def read_cached(top: FormatNode, offset: int, buffer: memoryview) -> bool:
    """Fill ``buffer`` if it lies in one piece of one layer, and in memory. False if not, or if nobody can tell."""
    node, length = top, len(buffer)
    while True:
        if node.cipher is not None or node.report is not None or offset + length > node._size:
            return False
        lock, inflight = node.lock, node.inflight
        with lock:
            host = node.cached_host(offset, length) if node.failure is None else -1
            if host >= 0:
                ticket = inflight.take()
        if host >= 0:
            try:
                return node.sources[0].node.read_cached(host, buffer)
            finally:
                with lock:
                    inflight.give_back(ticket)
        backing = node.backing
        if host == -1 or backing is None:
            return False
        below = backing.node
        if not below.layered:
            return offset + length <= below.size and below.read_cached(offset, buffer)
        node = below  # type: ignore[assignment]


def file_range(node: FormatNode, offset: int, length: int) -> tuple[int, int] | None:
    """Where a range that is one piece of this layer lies in a file; only where nobody writes, so nothing moves."""
    if not node.read_only or node.cipher is not None or node.report is not None or offset + length > node._size:
        return None
    with node.lock:
        host = node.cached_host(offset, length) if node.failure is None else -1
    return node.sources[0].node.file_range(host, length) if host >= 0 else None


def direct_range(node: FormatNode, offset: int, length: int) -> tuple[int, int, Callable[[], None] | None] | None:
    """As :meth:`byre.graph.node.Node.direct_range`, for a range that is one piece of the top layer.

    Its place is not given to anybody else before the caller has given it back.
    """
    if node.cipher is not None or node.report is not None or offset + length > node._size:
        return None
    lock, inflight = node.lock, node.inflight
    with lock:
        host = node.cached_host(offset, length) if node.failure is None else -1
        if host < 0:
            return None
        ticket = inflight.take()

    def give_back() -> None:
        with lock:
            inflight.give_back(ticket)

    found = node.sources[0].node.direct_range(host, length)
    if found is None:
        give_back()
        return None
    return found[0], found[1], give_back
