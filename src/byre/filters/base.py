"""What all filters share: a node that passes everything through, and a lock over byte ranges.

A filter has one filtered child, the edge ``file``; a subclass overrides the requests it changes.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

from ..graph.node import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..graph.child import Child
    from ..graph.opening import OpenRequest
    from ..io.extent import Extent
    from ..io.extentmap import ExtentMap

__all__ = ["CompressionFilter", "FilterNode", "NotifyingFilter", "RangeLock", "open_filtered"]


class FilterNode(Node):
    """Passes every request to its ``file`` child unchanged."""

    kind = "filter"

    @property
    def below(self) -> Node:
        """The filtered node."""
        return self.children["file"].node

    @property
    def takes_events(self) -> bool:  # type: ignore[override]
        return "file" in self.children and self.below.takes_events

    def debug_event(self, name: str) -> None:
        self.below.debug_event(name)

    @property
    def size(self) -> int:
        return self.below.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.below.read_into(offset, buffer)

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.below.readv_into(offset, buffers)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.below.write_from(offset, buffer, flags)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self.below.writev_from(offset, buffers, flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.below.write_zeroes(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def flush(self) -> None:
        self.below.flush()

    def block_status(self, offset: int, length: int) -> Extent:
        return self.below.block_status(offset, length)

    def extents(self, offset: int, length: int) -> ExtentMap:
        return self.below.extents(offset, length)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        self.below.resize(size, preallocation=preallocation, exact=exact)

    def populate(self, offset: int, length: int, *, base: Node | None = None, everything: bool = False) -> int:
        return self.below.populate(offset, length, base=base, everything=everything)

    def refresh_size(self) -> None:
        self.below.refresh_size()

    @property
    def has_zero_init(self) -> bool:
        return self.below.has_zero_init

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        return used, shared


class CompressionFilter(FilterNode):
    """Can store compressed clusters exactly if the node below can; see :class:`byre.formats.abilities.HasCompression`.

    What makes up the ability is looked up when it is asked for: without it below, there are no such attributes.
    """

    def before_compressed(self, offset: int, length: int) -> None:
        """Compressed clusters for the range are about to be written."""

    @property
    def cluster_size(self) -> int:
        return self._below_attribute("cluster_size")  # type: ignore[no-any-return]

    @property
    def compress(self) -> Callable[[memoryview], bytes | None]:
        return self._below_attribute("compress")  # type: ignore[no-any-return]

    @property
    def write_compressed(self) -> Callable[[int, memoryview], None]:
        write = self._below_attribute("write_compressed")

        def passed_on(offset: int, buffer: memoryview) -> None:
            self.before_compressed(offset, len(buffer))
            write(offset, buffer)

        return passed_on

    @property
    def write_compressed_clusters(self) -> Callable[[int, list[bytes]], None]:
        write = self._below_attribute("write_compressed_clusters")

        def passed_on(offset: int, payloads: list[bytes]) -> None:
            self.before_compressed(offset, len(payloads) * self.cluster_size)
            write(offset, payloads)

        return passed_on

    def _below_attribute(self, name: str) -> Any:
        """:raises AttributeError: the node below has none"""
        return getattr(self.below, name)


class NotifyingFilter(FilterNode):
    """Tells :meth:`before_write` of every request that changes what the node reads as, before it is carried out."""

    def before_write(self, offset: int, length: int) -> None:
        """``[offset, offset + length)`` is about to change; on return it may. An error fails the request instead.

        Called in the thread of the request, by several at once.
        """
        raise NotImplementedError

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.before_write(offset, len(buffer))
        self.below.write_from(offset, buffer, flags)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self.before_write(offset, sum(map(len, buffers)))
        self.below.writev_from(offset, buffers, flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.before_write(offset, length)
        self.below.write_zeroes(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.before_write(offset, length)
        self.below.discard(offset, length)


def open_filtered(request: OpenRequest, node: FilterNode, edge: str, below: Node) -> None:
    """Attach ``below`` to the new ``node``, which takes over its limits and, as ``file``, its name in messages.

    The node is registered first, so that a failure from here on closes it.
    """
    graph = request.opener.graph
    if edge == "file":
        node.limits = below.limits
        node.filename = below.filename
    if graph.nodes.get(node.name) is not node:
        request.opener.adopt(node)
    graph.attach(node, edge, below, "filtered")


class RangeLock:
    """Keeps overlapping byte ranges apart: exclusive ones from all others, shared ones from exclusive ones.

    Waiters are served in the order of arrival where they overlap. One that waits for a range held by another keeps
    nobody else waiting until then: a request held at a breakpoint stops those it overlaps, not those these overlap.

    Guarded by: its own condition.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: list[tuple[int, int, bool]] = []
        self._waiting: list[tuple[int, int, bool]] = []

    def enter(self, start: int, end: int, exclusive: bool) -> tuple[int, int, bool]:
        """Wait until ``[start, end)`` is free of conflicts; give the result to :meth:`leave`."""
        entry = _Entry((start, end, exclusive))
        with self._changed:
            self._waiting.append(entry)
            while self._blocked(entry):
                self._changed.wait()
            self._waiting = [other for other in self._waiting if other is not entry]
            self._entries.append(entry)
            self._changed.notify_all()
        return entry

    def _blocked(self, entry: tuple[int, int, bool]) -> bool:
        if self._held_up(entry):
            return True
        earlier = itertools.takewhile(lambda other: other is not entry, self._waiting)
        return any(_clash(entry, other) and not self._held_up(other) for other in earlier)

    def _held_up(self, entry: tuple[int, int, bool]) -> bool:
        """Whether a range that is in use keeps ``entry`` waiting."""
        return any(_clash(entry, other) for other in self._entries)

    def leave(self, entry: tuple[int, int, bool]) -> None:
        with self._changed:
            self._entries = [other for other in self._entries if other is not entry]
            self._changed.notify_all()


def _clash(one: tuple[int, int, bool], other: tuple[int, int, bool]) -> bool:
    return other[0] < one[1] and one[0] < other[1] and (one[2] or other[2])


class _Entry(tuple[int, int, bool]):
    """A tuple with an identity of its own: constants may be shared between equal tuples."""

    __slots__ = ()
