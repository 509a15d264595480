"""Populate: copy into a layer what it shows of the layers below, without changing what it reads as.

What copy-on-read does range by range and ``stream`` does to a whole disk. A unit is written only while nothing in
the layer answers for it, under a claim, so that a writer who comes at the same time is never overwritten by what lies
below. Dirty bitmaps are not marked: no byte of the disk changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import ReadOnly
from ..io import engine
from ..io.buffers import is_zero, zero_runs
from ..io.extent import DATA, UNALLOCATED, ZERO
from ..units import align_down, align_up
from .chain import skip_filters

if TYPE_CHECKING:
    from ..formats.base import FormatNode
    from .node import Node

__all__ = ["below", "populate"]

STEP: Final = 1 << 20
"""Bytes copied under one claim, at most, where a unit of the layer is not larger; what a call needs of memory."""


def populate(node: FormatNode, offset: int, length: int, *, base: Node | None = None, everything: bool = False) -> int:
    """Have ``node`` itself hold what the range reads as; whole units (clusters, subclusters) around it.

    Call it as ``node.populate(...)``, so that filters on top learn of it.

    :param base: leave what this node and those below it hold where it is
    :param everything: also what no layer holds, as zeroes; otherwise that stays unallocated
    :returns: bytes that ``node`` did not hold before
    :raises ReadOnly: the node is read-only
    :raises ByreError: reading below or writing failed; each unit is as before, or copied
    """
    if node.read_only:
        raise ReadOnly("cannot copy into the image: it is open read-only", where=node.filename)
    unit = node.zero_unit
    position = align_down(offset, unit)
    end = min(align_up(offset + length, unit), node.size)
    step = max(STEP // unit, 1) * unit
    copied = 0
    while position < end:
        own = node.block_status(position, end - position)
        if own.kind != UNALLOCATED:
            position = own.end
            continue
        kind, count = below(node, position, own.length, base)
        if kind == UNALLOCATED and everything:
            kind = ZERO
        if position + count < own.end:
            count = align_down(count, unit)
            if not count:  # the layers below change within this unit
                kind, count = DATA, min(unit, own.length)
        if kind != UNALLOCATED:
            count = min(count, step) if kind == DATA else count
            copied += _copy(node, position, position + count, kind)
        position += count
    return copied


def below(node: Node, offset: int, length: int, base: Node | None = None) -> tuple[int, int]:
    """(DATA, ZERO or UNALLOCATED; bytes from ``offset`` that are so) in the layers below ``node`` and above ``base``.

    A layer reads as zeroes behind its end, whatever lies below it.
    """
    base = skip_filters(base) if base is not None else None
    edge = node.children.get("backing")
    while edge is not None:
        layer = skip_filters(edge.node)
        if layer is base:
            break
        if offset >= layer.size:
            return ZERO, length
        extent = layer.block_status(offset, min(length, layer.size - offset))
        length = extent.length
        if extent.kind != UNALLOCATED:
            return (ZERO if extent.kind == ZERO else DATA), length
        edge = layer.children.get("backing")
    return UNALLOCATED, length


def _copy(node: FormatNode, start: int, stop: int, kind: int) -> int:
    """Fill what ``node`` still does not hold of whole units; bytes filled."""
    unit = node.cluster_size
    with node.lock:
        node.check_failure()
        # Nothing to wait for but claims: where nothing is allocated, no request can be writing in place.
        node.inflight.hold(align_down(start, unit), align_up(stop, unit), settle=False)
    try:
        with node.lock:
            runs = _missing(node, start, stop)
        for first, last in runs:
            if kind == ZERO:
                _write_zeroes(node, first, last)
            else:
                _write(node, first, last)
    finally:
        with node.lock:
            node.inflight.let_go()
    return sum(last - first for first, last in runs)


def _missing(node: FormatNode, start: int, stop: int) -> list[tuple[int, int]]:
    """The ranges that ``node`` does not hold; lock held."""
    node.check_failure()
    runs: list[tuple[int, int]] = []
    while start < stop:
        for extent in node.lookup(start, stop - start):
            start = extent.end
            if extent.kind != UNALLOCATED:
                continue
            if runs and runs[-1][1] == extent.offset:
                runs[-1] = runs[-1][0], extent.end
            else:
                runs.append((extent.offset, extent.end))
    return runs


def _write(node: FormatNode, start: int, stop: int) -> None:
    """Copy from below, zeroes as zero clusters; the range is held."""
    assert node.backing is not None
    view = memoryview(bytearray(stop - start))
    node.backing.node.read_into(start, view)
    if len(view) > node.zero_unit:
        pieces = zero_runs(view, node.zero_unit)
    else:
        pieces = [(0, len(view), is_zero(view))]
    for first, length, zero in pieces:
        if zero:
            _write_zeroes(node, start + first, start + first + length)
        else:
            _write_data(node, start + first, view[first : first + length])


def _write_zeroes(node: FormatNode, start: int, stop: int) -> None:
    """As zero clusters, or as data where the format has none; the range is held."""
    cluster, last = node.cluster_size, align_up(stop, node.zero_unit)
    while start < stop:
        until = min(last, align_up(start, cluster)) if start % cluster else last
        with node.lock:
            node.check_failure()
            done = node.unmap(start, until - start, ZERO, keep=False)
        if not done:
            zeroes = memoryview(bytes(min(STEP, stop - start)))
            done = len(zeroes)
            _write_data(node, start, zeroes)
        start += done


def _write_data(node: FormatNode, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += engine.write_step(node, offset + done, view[done:])
