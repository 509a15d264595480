"""Requests on parts of encrypted sectors: widened to whole ones, read-modify-write under a claim.

Only nodes with a cipher come here, and only with requests that do not begin and end between sectors. A writer holds the
clusters it touches until the whole sectors are written; a reader waits for such writers, and they for it, so that
nobody decrypts half of an old sector and half of a new one.
"""

from __future__ import annotations

from ..typing import TYPE_CHECKING
from ..units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..formats.base import FormatNode

__all__ = ["read", "write", "write_zeroes"]


def read(
    node: FormatNode, offset: int, buffer: memoryview, action: Callable[[FormatNode, int, memoryview], None]
) -> None:
    """Fill ``buffer`` from ``offset`` through ``action``, which is given whole sectors."""
    size = node.sector_mask + 1
    end = offset + len(buffer)
    start, stop = align_down(offset, size), align_up(end, size)
    with node.lock:
        node.check_failure()
        node.inflight.wait_clear(start, stop)
        ticket = node.inflight.take()
    try:
        whole = memoryview(bytearray(stop - start))
        action(node, start, whole)
    finally:
        with node.lock:
            node.inflight.give_back(ticket)
    buffer[:] = whole[offset - start : end - start]


def write(node: FormatNode, offset: int, buffer: memoryview, flags: int) -> None:
    """Write ``buffer`` at ``offset``; what else its first and last sector hold stays."""
    size, unit = node.sector_mask + 1, node.cluster_size
    end = offset + len(buffer)
    start, stop = align_down(offset, size), align_up(end, size)
    with node.lock:
        node.check_failure()
        node.inflight.hold(align_down(start, unit), align_up(stop, unit))
    try:
        whole = memoryview(bytearray(stop - start))
        if start < offset:
            node.read_into(start, whole[:size])
        if end < stop and (stop - start > size or start == offset):
            node.read_into(stop - size, whole[-size:])
        whole[offset - start : end - start] = buffer
        node.write_from(start, whole, flags)
    finally:
        with node.lock:
            node.inflight.let_go()


def write_zeroes(node: FormatNode, offset: int, length: int, flags: int) -> None:
    """Zero a range: parts of sectors as data, the whole ones between them as the format can."""
    size = node.sector_mask + 1
    end = offset + length
    first, last = align_up(offset, size), align_down(end, size)
    if first >= last:
        write(node, offset, memoryview(bytes(length)), flags)
        return
    if offset < first:
        write(node, offset, memoryview(bytes(first - offset)), 0)
    if last < end:
        write(node, last, memoryview(bytes(end - last)), 0)
    node.write_zeroes(first, last - first, flags)
