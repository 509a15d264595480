"""The state of a virtual machine: bytes kept behind the disk, where the guest cannot reach them.

The area begins at the first L1 entry that the disk does not need, in the same tables as the disk, and goes along with
a snapshot that records its length. What is not written there reads as zeroes; no backing file shows through.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from ...errors import InvalidArgument, NotSupported
from ...io import behind
from ...units import align_down, align_up
from . import layout
from .resizing import grow_l1

if TYPE_CHECKING:
    from .image import Qcow2Node

__all__ = ["area", "drop", "load", "save"]

_STEP: Final = 4 << 20


def area(node: Qcow2Node) -> int:
    """Guest offset at which the area begins."""
    header = node.header
    entries = layout.l1_entries_needed(node.size, header.cluster_bits, extended_l2=header.extended_l2)
    return entries << node.mapping.span_bits


def _range(node: Qcow2Node, position: int, length: int) -> tuple[int, int]:
    """Guest range of ``length`` bytes at ``position`` of the area.

    :raises InvalidArgument: it lies behind what tables can map (EFBIG)
    """
    start = area(node) + position
    if position < 0 or start + length > layout.MAX_L1_SIZE // 8 << node.mapping.span_bits:
        raise InvalidArgument(f"machine state at {position:#x} lies behind what the image can hold",
                              where=node.filename, errno=errno.EFBIG)  # fmt: skip
    return start, start + length


def load(node: Qcow2Node, position: int, view: memoryview) -> None:
    """Fill ``view`` from byte ``position`` of the area.

    :raises InvalidArgument: the range lies behind what the image can hold
    """
    start, _ = _range(node, position, len(view))
    if node.report is not None:
        node.report("vmstate_load")
    behind.read(node, start, view)


def save(node: Qcow2Node, position: int, view: memoryview) -> None:
    """Write ``view`` at byte ``position`` of the area, in whole clusters.

    :raises NotSupported: guest data lies in an external data file
    :raises InvalidArgument: the range lies behind what the image can hold
    """
    if node.header.has_data_file:
        raise NotSupported("an image with an external data file cannot hold machine state", where=node.filename)
    if not len(view):
        return
    size = node.cluster_size
    with node.vmstate_lock:
        start, end = _range(node, position, len(view))
        _make_room(node, end)
        if node.report is not None:
            node.report("vmstate_save")
        done = 0
        while done < len(view):
            at = start + done
            step = min(len(view) - done, _STEP - at % size)
            first, last = align_down(at, size), align_up(at + step, size)
            piece = view[done : done + step]
            if last - first != step:
                # The engine takes what is behind the disk's end for zeroes: give it nothing to fill in.
                whole = memoryview(bytearray(last - first))
                behind.read(node, first, whole)
                whole[at - first : at - first + step] = piece
                piece = whole
            behind.write(node, first, piece)
            done += step


def _make_room(node: Qcow2Node, end: int) -> None:
    """Have an L1 table that reaches to guest offset ``end``."""
    entries = -(-end >> node.mapping.span_bits)
    with node.lock:
        node.check_failure()
        if not node.read_only and entries > len(node.mapping.l1):
            node.inflight.wait_all()
            node.check_failure()
            node._guarded(lambda: grow_l1(node, entries))


def drop(node: Qcow2Node) -> None:
    """Let go of everything in the area; lock held."""
    mapping = node.mapping
    first = area(node) >> mapping.span_bits
    if not any(mapping.l1[first:]):
        return
    node._before_change()
    node._dropping = "other"
    stride = 2 if node.header.extended_l2 else 1
    for index in range(first, len(mapping.l1)):
        host = mapping.l2_host(index)
        if not host:
            continue
        words = mapping.l2.get(host).words
        assert words is not None
        for word in filter(None, words[::stride]):
            mapping.drop(word)
        mapping._set_l1(index, 0)
        mapping.l2.forget(host)
        node._free(host >> node.header.cluster_bits, 1)
