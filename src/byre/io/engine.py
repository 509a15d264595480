"""The engine: read, write, fill, zero, discard and flush for every format.

A format answers where (its hooks run under the node lock); the engine moves the bytes with no lock
held. Copy-on-write, zero detection, encryption, claims and tickets are here, once.
"""

from __future__ import annotations

from time import perf_counter_ns

from ..errors import NotSupported, ReadOnly
from ..typing import TYPE_CHECKING, Final
from ..units import align_down, align_up
from . import sectors
from .buffers import is_zero, zero_fill
from .extent import COMPRESSED, DATA, FUA, MAY_UNMAP, NO_FALLBACK, UNALLOCATED, ZERO, Extent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..formats.base import FormatNode, Placement
    from ..graph.node import Node

__all__ = ["discard", "flush", "read", "read_layer", "reads_zero", "write", "write_compressed", "write_step",
           "write_zeroes"]  # fmt: skip

_ZEROES: Final = bytes(1 << 20)


# -- read -----------------------------------------------------------------------------------------


def read(node: FormatNode, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``offset``; zeroes past the end.

    Layers below are visited in a loop, so that the depth of a chain costs no stack.
    """
    if (offset | len(buffer)) & node.sector_mask:
        sectors.read(node, offset, buffer, read)
        return
    below = read_layer(node, offset, buffer)
    while below:
        lower, at, view = below.pop()
        if lower.layered and not (at | len(view)) & lower.sector_mask:  # type: ignore[attr-defined]
            below += read_layer(lower, at, view)  # type: ignore[arg-type]
        else:
            lower.read_into(at, view)


def read_layer(node: FormatNode, offset: int, view: memoryview, size: int = -1) -> list[tuple[Node, int, memoryview]]:
    """Read what this layer holds up to ``size`` (the disk's); returns what the layer below must provide."""
    started = perf_counter_ns()
    below: list[tuple[Node, int, memoryview]] = []
    length = len(view)
    inside = (node._size if size < 0 else size) - offset
    if length > inside:
        inside = max(inside, 0)
        zero_fill(view[inside:])
        view = view[:inside]
    position, end = offset, offset + len(view)
    lock, inflight = node.lock, node.inflight
    while position < end:
        with lock:
            if node.failure is not None:
                node.check_failure()
            extents = node.lookup(position, end - position)
            ticket = inflight.take()
        try:
            for extent in extents:
                at, size, kind, host, source = extent
                piece = view if size == length else view[at - offset : at - offset + size]
                if kind == DATA:
                    if node.report is not None:
                        node.report("read_aio")
                    node.sources[source].node.read_into(host, piece)
                    if node.cipher is not None:
                        node.cipher.decrypt(host if node.cipher.by_host else at, piece)
                elif kind == UNALLOCATED and node.backing is not None:
                    if node.report is not None:
                        node.report("read_backing_aio")
                    below.append((node.backing.node, at, piece))
                elif kind == COMPRESSED:
                    if node.report is not None:
                        node.report("read_compressed")
                    node.decompress(extent, piece)
                else:
                    zero_fill(piece)
        except BaseException:
            node.stats.failed(0)
            with lock:
                inflight.give_back(ticket)
            raise
        position = at + size
        with lock:
            inflight.give_back(ticket)
    stats = node.stats
    elapsed = perf_counter_ns() - started
    with lock:
        stats.operation_count[0] += 1
        stats.byte_count[0] += length
        stats.nanoseconds[0] += elapsed
    return below


def reads_zero(node: Node, offset: int, length: int) -> bool:
    """Whether the metadata of the whole chain says that the range reads as zeroes (data is not looked at)."""
    while node.kind == "filter" and "file" in node.children:  # it shows the extents of what is below
        node = node.children["file"].node
    end = offset + length
    while offset < end:
        extent = node.block_status(offset, end - offset)
        if extent.kind == UNALLOCATED:
            backing = node.children.get("backing")
            if backing is not None and not reads_zero(backing.node, offset, extent.length):
                return False
        elif extent.kind != ZERO and not _file_hole(node, extent):
            return False
        offset += extent.length
    return True


def _file_hole(node: Node, extent: Extent) -> bool:
    """A raw node says DATA of what its file may know to be a hole."""
    if extent.kind != DATA or extent.host < 0 or node.layered or not hasattr(node, "sources"):
        return False
    return reads_zero(node.sources[extent.source].node, extent.host, extent.length)


# -- write ----------------------------------------------------------------------------------------


def write(node: FormatNode, offset: int, buffer: memoryview, flags: int = 0) -> None:
    """Write ``buffer`` at ``offset``.

    :raises ReadOnly: the node is read-only
    """
    started = perf_counter_ns()
    length = len(buffer)
    if node.read_only:
        raise ReadOnly("cannot write: the image is open read-only", where=node.filename)
    if (offset | length) & node.sector_mask:
        sectors.write(node, offset, buffer, flags)
        return
    if node.detect_zeroes != "off" and is_zero(buffer):
        unmap = MAY_UNMAP if node.detect_zeroes == "unmap" else 0
        write_zeroes(node, offset, length, flags & FUA | unmap)
        return
    done = 0
    try:
        try:
            while done < length:
                done += write_step(node, offset + done, buffer[done:] if done else buffer)
        finally:
            # A write that failed may have changed something.
            if node.tracker is not None:
                node.tracker.mark(offset, length)
        if flags & FUA:
            flush(node)
    except BaseException:
        node.stats.failed(1)
        raise
    node.stats.done(1, length, started)


def write_step(node: FormatNode, offset: int, view: memoryview) -> int:
    """Write as much as one reservation covers; bytes written."""
    inflight = node.inflight
    end = offset + len(view)
    unit = node.cluster_size
    with node.lock:
        if node.failure is not None:
            node.check_failure()
        if inflight.wait_clear(align_down(offset, unit), align_up(end, unit)):
            node.check_failure()
        host = node.in_place(offset, len(view))
        if host >= 0:
            ticket = inflight.take()
    if host >= 0:
        # Most writes meet clusters that are there already: nothing to reserve, nothing to publish.
        try:
            node.sources[0].node.write_from(host, view)
        finally:
            with node.lock:
                inflight.give_back(ticket)
        return len(view)
    return _write_reserved(node, offset, view)


def _write_reserved(node: FormatNode, offset: int, view: memoryview) -> int:
    """As :func:`write_step`, through reserve and publish."""
    inflight = node.inflight
    end = offset + len(view)
    unit = node.cluster_size
    with node.lock:
        # Looked at again: the lock was let go.
        node.check_failure()
        inflight.wait_clear(align_down(offset, unit), align_up(end, unit))
        node.check_failure()
        placements = node.reserve(offset, len(view))
        fresh = [placement for placement in placements if placement.fresh]
        claims = [inflight.claim(placement.offset, placement.offset + placement.length) for placement in fresh]
        ticket = inflight.take()
    stop = min(placements[-1].offset + placements[-1].length, end)
    published = False
    try:
        for placement in placements:
            _place(node, placement, offset, stop, view)
        with node.lock:
            if fresh:
                node.check_failure()
                published = True
                node.publish(fresh)
    except BaseException:
        with node.lock:
            if fresh and not published and node.failure is None:
                node.cancel(fresh)
        raise
    finally:
        with node.lock:
            for claim in claims:
                inflight.release(claim)
            inflight.give_back(ticket)
    return stop - offset


def _place(node: FormatNode, placement: Placement, offset: int, stop: int, view: memoryview) -> None:
    """Write the request's part of one placement, and around it what a fresh one reads as now."""
    start = max(placement.offset, offset)
    end = min(placement.offset + placement.length, stop)
    data = view[start - offset : end - offset]
    target = node.sources[placement.source].node
    if node.report is not None:
        _report_write(node, placement, start, end)
    if not placement.fresh:
        if node.cipher is not None:
            data = _encrypted(node, placement.host, start, [data])
        target.write_from(placement.host, data)
        return
    head = start - placement.offset
    tail = placement.offset + placement.length - end
    host = placement.host
    if placement.blank and placement.zeroed and node.cipher is None:
        target.write_from(host + head, data)
        return
    parts = [data]
    if head:
        parts.insert(0, _current(node, placement.offset, head, placement.blank))
    if tail:
        parts.append(_current(node, end, tail, placement.blank))
    if node.cipher is not None:
        target.write_from(host, _encrypted(node, host, placement.offset, parts))
    elif len(parts) == 1:
        target.write_from(host, data)
    else:
        target.writev_from(host, parts)


def _report_write(node: FormatNode, placement: Placement, start: int, end: int) -> None:
    assert node.report is not None
    if placement.fresh and (start > placement.offset or end < placement.offset + placement.length):
        if placement.blank:
            node.report("cluster_alloc_space")
        else:
            node.report("cow_read")
            node.report("cow_write")
    node.report("write_aio")


def _current(node: FormatNode, offset: int, length: int, blank: bool) -> memoryview:
    """What ``[offset, offset + length)`` reads as before the write."""
    if blank and length <= len(_ZEROES):
        return memoryview(_ZEROES)[:length]
    view = memoryview(bytearray(length))
    if not blank:
        read(node, offset, view)
    return view


def _encrypted(node: FormatNode, host: int, guest: int, parts: Sequence[memoryview]) -> memoryview:
    assert node.cipher is not None
    bounce = bytearray().join(parts)
    node.cipher.encrypt(host if node.cipher.by_host else guest, bounce)
    return memoryview(bounce)


# -- compressed -----------------------------------------------------------------------------------


def write_compressed(node: FormatNode, offset: int, payloads: Sequence[bytes]) -> None:
    """Store the compressed forms of consecutive clusters from ``offset``, packed one behind the other.

    The node has the hooks ``prepare_compressed``, ``reserve_compressed``, ``publish_compressed`` and
    ``cancel_compressed``.
    """
    if node.read_only:
        raise ReadOnly("cannot write: the image is open read-only", where=node.filename)
    started = perf_counter_ns()
    inflight = node.inflight
    end = offset + len(payloads) * node.cluster_size
    target = node.sources[0].node
    with node.lock:
        node.check_failure()
        inflight.wait_clear(offset, end)
        node.check_failure()
        node.prepare_compressed(offset, end)
        hosts = node.reserve_compressed([len(payload) for payload in payloads])
        claim = inflight.claim(offset, end)
        ticket = inflight.take()
    published = False
    try:
        if node.report is not None:
            node.report("write_compressed")
        for host, run in _contiguous(hosts, payloads):
            target.writev_from(host, run)
        with node.lock:
            node.check_failure()
            published = True
            node.publish_compressed(offset, hosts, [len(payload) for payload in payloads])
    except BaseException:
        with node.lock:
            if not published and node.failure is None:
                node.cancel_compressed(hosts, [len(payload) for payload in payloads])
        node.stats.failed(1)
        raise
    finally:
        if node.tracker is not None:
            node.tracker.mark(offset, end - offset)
        with node.lock:
            inflight.release(claim)
            inflight.give_back(ticket)
    node.stats.done(1, end - offset, started)


def _contiguous(hosts: Sequence[int], payloads: Sequence[bytes]) -> list[tuple[int, list[memoryview]]]:
    """(host offset, buffers) of runs whose host ranges follow each other."""
    runs: list[tuple[int, list[memoryview]]] = []
    expected = -1
    for host, payload in zip(hosts, payloads, strict=True):
        if host != expected:
            runs.append((host, []))
        runs[-1][1].append(memoryview(payload))
        expected = host + len(payload)
    return runs


# -- zero and discard -----------------------------------------------------------------------------


def write_zeroes(node: FormatNode, offset: int, length: int, flags: int = 0) -> None:
    """Make a range read as zeroes: whole units through the tables, the rest as data."""
    if node.read_only:
        raise ReadOnly("cannot write: the image is open read-only", where=node.filename)
    if (offset | length) & node.sector_mask:
        sectors.write_zeroes(node, offset, length, flags)
        return
    started = perf_counter_ns()
    end = min(offset + length, node._size)
    position = offset
    unit = node.zero_unit
    try:
        while position < end:
            first = align_down(position, unit)
            # The last unit of the image counts as whole.
            last = align_down(end, unit) if end < node._size else align_up(end, unit)
            if position == first and last > first:
                position = _zero_whole(node, first, last, end, flags)
            else:
                stop = min(first + unit, end)
                _zero_part(node, position, stop, flags)
                position = stop
        if flags & FUA:
            flush(node)
    except BaseException:
        node.stats.failed(2)
        raise
    finally:
        if node.tracker is not None:
            node.tracker.mark(offset, end - offset)
    node.stats.done(2, length, started)


def _zero_whole(node: FormatNode, first: int, last: int, end: int, flags: int) -> int:
    """Zero whole units of ``[first, last)``; the guest offset reached."""
    unit = node.cluster_size
    if first % unit:
        # Part of a cluster goes alone: the format may be able to zero only whole ones.
        last = min(last, align_up(first, unit))
    with node.lock:
        node.check_failure()
        node.inflight.wait_clear(align_down(first, unit), align_up(last, unit))
        node.check_failure()
        done = node.unmap(first, last - first, ZERO, keep=not flags & MAY_UNMAP)
    if done:
        return min(first + done, end)
    stop = min(last, end)
    _zero_as_data(node, first, stop, flags)
    return stop


def _zero_part(node: FormatNode, start: int, stop: int, flags: int) -> None:
    """Zero part of one unit: the whole unit if the rest of it reads as zeroes anyway, else as data."""
    unit, cluster = node.zero_unit, node.cluster_size
    first = align_down(start, unit)
    last = min(first + unit, align_up(node._size, unit))
    span = align_down(start, cluster), align_up(stop, cluster)
    with node.lock:
        node.check_failure()
        node.inflight.wait_clear(*span)
        claim = node.inflight.claim(*span)
    try:
        rest_end = min(last, node._size)
        done = 0
        if reads_zero(node, first, start - first) and reads_zero(node, stop, rest_end - stop):
            with node.lock:
                node.check_failure()
                done = node.unmap(first, last - first, ZERO, keep=not flags & MAY_UNMAP)
    finally:
        with node.lock:
            node.inflight.release(claim)
    if not done:
        _zero_as_data(node, start, stop, flags)


def _zero_as_data(node: FormatNode, start: int, stop: int, flags: int) -> None:
    if flags & NO_FALLBACK:
        raise NotSupported("the image cannot zero this range without writing it", where=node.filename)
    zeroes = memoryview(_ZEROES)
    while start < stop:
        view = zeroes[: min(len(zeroes), stop - start)]
        done = 0
        while done < len(view):
            done += write_step(node, start + done, view[done:])
        start += len(view)


def discard(node: FormatNode, offset: int, length: int) -> None:
    """Give whole clusters back; parts of clusters are left alone."""
    if node.read_only:
        raise ReadOnly("cannot discard: the image is open read-only", where=node.filename)
    started = perf_counter_ns()
    if not node.pass_discard:
        return
    unit = node.cluster_size
    end = min(offset + length, node._size)
    first = align_up(offset, unit)
    last = align_down(end, unit) if end < node._size else align_up(end, unit)
    begin = first
    try:
        while first < last:
            with node.lock:
                node.check_failure()
                node.inflight.wait_clear(first, last)
                node.check_failure()
                done = node.unmap(first, last - first, UNALLOCATED, keep=False)
            if not done:
                return
            first += done
    except BaseException:
        node.stats.failed(3)
        raise
    finally:
        if node.tracker is not None:
            node.tracker.mark(begin, min(last, end) - begin)
    node.stats.done(3, length, started)


# -- flush ----------------------------------------------------------------------------------------


def flush(node: FormatNode) -> None:
    """Make everything written so far durable.

    :raises IOFailure: a write or flush below failed; the node is out of service from then on
    """
    started = perf_counter_ns()
    try:
        apart = not node.read_only and node.failure is None and node.write_back_apart()
    except BaseException:
        node.stats.failed(4)
        raise
    with node.lock:
        node.check_failure()
        if node.read_only:
            return
        try:
            if node.report is not None:
                node.report("flush_to_os")
            if not apart:
                node.write_back()
        except BaseException as error:
            node.stats.failed(4)
            node.fail_stop(error)
            raise
    try:
        if node.report is not None:
            node.report("flush_to_disk")
        for name, child in list(node.children.items()):
            if name != "backing":
                child.node.flush()
    except BaseException as error:
        node.stats.failed(4)
        with node.lock:
            node.fail_stop(error)
        raise
    node.stats.done(4, 0, started)
