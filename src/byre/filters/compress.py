"""Compression: a filter whose writes are stored as compressed clusters.

Driver ``compress``. Whole clusters go compressed, packed one behind the other; a cluster that does not shrink is
written as it is. Parts of clusters are completed with what the rest of the cluster reads as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from ..errors import NotSupported
from ..formats.abilities import HasCompression
from ..io.extent import FUA
from ..options import OptionSet
from ..units import align_down, align_up
from .base import FilterNode, RangeLock, open_filtered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..graph.node import Node
    from ..graph.opening import OpenRequest

__all__ = ["CompressNode"]

OPTIONS: Final = OptionSet()
CHILDREN: Final = ("file",)

_PENDING: Final = 1 << 20
"""Bytes of the disk that are compressed before they are written in one request."""


def open_node(request: OpenRequest) -> CompressNode:
    below = request.open_child("file", flags=request.flags._replace(detect_zeroes="off"))
    node = CompressNode(name=request.name, read_only=request.flags.read_only)
    open_filtered(request, node, "file", below)
    check_compression(below)
    return node


def check_compression(node: Node) -> None:
    """:raises NotSupported: ``node`` cannot hold compressed clusters"""
    if not isinstance(node, HasCompression):
        raise NotSupported(f"Compression is not supported for underlying format: {node.driver}", where=node.filename)


class CompressNode(FilterNode):
    """Compresses what is written.

    Whole clusters go side by side; a part of a cluster, which is read, completed and written, goes alone there.
    Memory: one cluster, or 1 MiB and its compressed form, per request.
    """

    driver = "compress"

    def __init__(self, *, name: str = "", read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self._ranges = RangeLock()

    @property
    def _target(self) -> HasCompression:
        return cast("HasCompression", self.below)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        unit, size, end = self._target.cluster_size, self.size, offset + len(buffer)
        position = offset
        while position < end:
            first = align_down(position, unit)
            stop = end if end == size else align_down(end, unit)
            if first == position < stop:
                view = buffer[position - offset : stop - offset]
                self._locked(position, stop, False, lambda at=position, view=view: self._write_clusters(at, view))  # type: ignore[misc]
            else:
                stop = min(first + unit, end)
                view = buffer[position - offset : stop - offset]
                self._locked(first, first + unit, True, lambda at=position, view=view: self._write_part(at, view))  # type: ignore[misc]
            position = stop
        if flags & FUA:
            self.below.flush()

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        # One request: each piece of a cluster would be completed and compressed on its own.
        self.write_from(offset, buffers[0] if len(buffers) == 1 else memoryview(b"".join(buffers)), flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self._locked(offset, offset + length, False, lambda: self.below.write_zeroes(offset, length, flags))

    def discard(self, offset: int, length: int) -> None:
        self._locked(offset, offset + length, False, lambda: self.below.discard(offset, length))

    def _locked(self, start: int, end: int, alone: bool, action: Callable[[], None]) -> None:
        claim = self._ranges.enter(start, end, alone)
        try:
            action()
        finally:
            self._ranges.leave(claim)

    def _write_clusters(self, offset: int, view: memoryview) -> None:
        """Whole clusters; the last one may be shorter where the disk ends."""
        target, unit = self._target, self._target.cluster_size
        payloads: list[bytes] = []
        start = offset
        for at in range(offset, offset + len(view), unit):
            cluster = view[at - offset : at - offset + unit]
            payload = target.compress(cluster)
            if payload is not None:
                payloads.append(payload)
            if payloads and (payload is None or len(payloads) * unit >= _PENDING):
                target.write_compressed_clusters(start, payloads)
                payloads, start = [], at + unit
            if payload is None:
                self.below.write_from(at, cluster)
                start = at + unit
        if payloads:
            target.write_compressed_clusters(start, payloads)

    def _write_part(self, offset: int, view: memoryview) -> None:
        """Part of one cluster, with the rest of it."""
        unit = self._target.cluster_size
        first = align_down(offset, unit)
        whole = memoryview(bytearray(min(align_up(offset + len(view), unit), self.size) - first))
        self.below.read_into(first, whole)
        whole[offset - first : offset - first + len(view)] = view
        self._write_clusters(first, whole)
