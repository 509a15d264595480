"""Image: the handle through which everyone outside the graph does I/O; :mod:`.opening` makes one from a name.

Library users, the command line, jobs and exports hold Images. An Image checks bounds and
writability, counts requests in flight, keeps statistics, and can be paused for graph changes.
"""

from __future__ import annotations

import threading
from time import perf_counter_ns

from .errors import Busy, InvalidArgument, NotSupported, ReadOnly
from .graph import chain
from .graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED, Node, Stats
from .io.extent import FUA, MAY_UNMAP, NO_FALLBACK
from .typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import TypeVar

    from .formats.abilities import HasSnapshots, SnapshotEntry
    from .graph.child import Child
    from .graph.graph import Graph
    from .io.extentmap import ExtentMap

    _T = TypeVar("_T")

__all__ = ["Image"]

_VERBS: Final = ("read", "write", "write", "discard", "flush")
"""For messages, by the kinds of ``Stats``."""


class Image:
    """An open image. A context manager; closing twice is fine; usable from many threads.

    Guarded by ``_gate``: ``_in_flight``, ``_paused``.

    :ivar node: the top node
    :ivar graph: the graph it lives in
    :ivar stats: requests seen here, by kind
    :ivar writethrough: every write is durable when it returns
    :param unchanged: what is written changes no byte of the disk (:meth:`within`); a read-only handle may do that
    """

    def __init__(
        self,
        node: Node,
        graph: Graph,
        *,
        read_only: bool = True,
        writethrough: bool = False,
        exclusive: bool = False,
        no_io: bool = False,
        resizable: bool = False,
        unchanged: bool = False,
        name: str = "",
    ) -> None:
        if not read_only and node.read_only:
            raise ReadOnly("the image is open read-only", where=node.filename)
        self.graph = graph
        self.read_only = read_only
        self.writethrough = writethrough
        self.name = name
        self._gate = threading.Lock()
        self.stats = Stats(self._gate)
        self._changed = threading.Condition(self._gate)
        self._in_flight = 0
        self._paused = 0
        self._closed = False
        used = 0 if no_io else PERM_READ | (0 if read_only else PERM_WRITE)
        if resizable and not read_only:
            used |= PERM_RESIZE
        if unchanged:
            used |= PERM_WRITE_UNCHANGED
        shared = PERM_ALL & ~(PERM_WRITE | PERM_RESIZE) if exclusive else PERM_ALL
        self._root: Child = graph.attach_image(node, name or "an open image", used, shared)
        with graph.lock:
            graph.images.append(self)

    @property
    def node(self) -> Node:
        return self._root.node

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._root.node.size

    @property
    def format(self) -> str:
        return self._root.node.driver

    @property
    def filename(self) -> str:
        return self._root.node.filename

    # -- requests ---------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        if not 0 <= length <= self.size:  # refused before memory is taken for it
            self._out_of_range("read", offset, length)
        data = bytearray(length)
        self.read_into(offset, data)
        return bytes(data)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from ``offset``.

        :raises InvalidArgument: the range is not inside the image
        """
        view = buffer if type(buffer) is memoryview else memoryview(buffer).cast("B")
        length = len(view)
        started = perf_counter_ns()
        gate = self._gate
        with gate:
            if self._paused:
                self._wait_unpaused()
            self._in_flight += 1
        try:
            node = self._root.node
            if offset < 0 or offset + length > node.size:
                self._out_of_range("read", offset, length)
            node.read_into(offset, view)
        except BaseException:
            self.stats.failed(Stats.READ)
            self._leave()
            raise
        elapsed = perf_counter_ns() - started
        stats = self.stats
        with gate:
            stats.operation_count[0] += 1
            stats.byte_count[0] += length
            stats.nanoseconds[0] += elapsed
            self._in_flight -= 1
            if self._paused:
                self._changed.notify_all()

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill several buffers from consecutive bytes."""
        self._request(Stats.READ, offset, sum(map(len, buffers)), lambda node: node.readv_into(offset, buffers))

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``; with ``fua`` it is durable on return.

        :raises ReadOnly: the image is open read-only
        :raises InvalidArgument: the range is not inside the image
        """
        view = data if type(data) is memoryview else memoryview(data).cast("B")
        flags = FUA if fua or self.writethrough else 0
        self._change(Stats.WRITE, offset, len(view), lambda node: node.write_from(offset, view, flags))

    def writev(self, offset: int, buffers: Sequence[memoryview], *, fua: bool = False) -> None:
        """Write several buffers to consecutive bytes in one request."""
        flags = FUA if fua or self.writethrough else 0
        length = sum(map(len, buffers))
        self._change(Stats.WRITE, offset, length, lambda node: node.writev_from(offset, buffers, flags))

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fua: bool = False, fallback: bool = True
    ) -> None:
        """Make a range read as zeroes.

        :param unmap: the space may be given back
        :param fallback: zeroes may be written as data where there is no quicker way
        """
        flags = (FUA if fua or self.writethrough else 0) | (MAY_UNMAP if unmap else 0)
        flags |= 0 if fallback else NO_FALLBACK
        self._change(Stats.ZEROES, offset, length, lambda node: node.write_zeroes(offset, length, flags))

    def write_compressed(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write one cluster compressed (the last one may be shorter).

        :raises NotSupported: the format has no compressed clusters
        """
        from .formats.abilities import HasCompression

        view = data if type(data) is memoryview else memoryview(data).cast("B")

        def action(node: Node) -> None:
            if not isinstance(node, HasCompression):
                raise NotSupported(f"driver {node.driver!r} has no compressed clusters", where=node.filename)
            node.write_compressed(offset, view)

        self._change(Stats.WRITE, offset, len(view), action)

    def write_compressed_clusters(self, offset: int, payloads: list[bytes]) -> None:
        """Store consecutive clusters from ``offset``, compressed by the node's ``compress``, in one request.

        :raises NotSupported: the format has no compressed clusters
        """
        from .formats.abilities import HasCompression

        def action(node: Node) -> None:
            if not isinstance(node, HasCompression):
                raise NotSupported(f"driver {node.driver!r} has no compressed clusters", where=node.filename)
            node.write_compressed_clusters(offset, payloads)

        length = min(len(payloads) * getattr(self.node, "cluster_size", 0), self.size - offset)
        self._change(Stats.WRITE, offset, length, action)

    def discard(self, offset: int, length: int) -> None:
        """The range is no longer needed. Reads as zeroes or as before, as the format can."""
        self._change(Stats.DISCARD, offset, length, lambda node: node.discard(offset, length))

    def flush(self) -> None:
        """What was written before the call is durable when it returns."""
        self._request(Stats.FLUSH, 0, 0, lambda node: node.flush())

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        """Change the virtual size, bytes; new space reads as zeroes.

        :param shrink: allow it to become smaller; what is cut off is gone
        """
        self._check_open()
        if self.read_only:
            raise ReadOnly("cannot resize: the image is open read-only", where=self.filename)
        if size < 0:
            raise InvalidArgument(f"cannot resize to {size} bytes", where=self.filename)
        if size < self.size and not shrink:
            raise InvalidArgument(f"shrinking from {self.size} to {size} bytes would lose data", where=self.filename,
                                  hint="use --shrink if that is meant")  # fmt: skip
        before = self._root.used
        self.graph.set_image_permissions(self._root, before | PERM_RESIZE, self._root.shared)
        try:
            if size < self.size:
                from .graph.live import settled

                # Nobody may be about to write behind the new end.
                with settled(self.graph, [self]) as (node,):
                    self._resize(node, size, preallocation)
            else:
                self.within(lambda: self._resize(self.node, size, preallocation))
        finally:
            self.graph.set_image_permissions(self._root, before, self._root.shared)

    def _resize(self, node: Node, size: int, preallocation: str) -> None:
        """Within a request, or while requests are held back: whoever blocks it has begun, or begins later."""
        if node.blockers or node.parents[1:]:
            from .graph.blockers import check_within

            check_within(node, "resize")
        node.resize(size, preallocation=preallocation)

    # -- internal snapshots -----------------------------------------------------------------------

    def create_snapshot(self, name: str, *, icount: int | None = None) -> SnapshotEntry:
        """Keep the disk as it is now inside the image, where the format can."""
        return self._alone("internal-snapshot", lambda holder: holder.create_snapshot(name, icount=icount))

    def apply_snapshot(self, name: str) -> None:
        """The disk becomes what it was when snapshot ``name`` (or id) was taken, in content and size."""
        self._alone("change", lambda holder: holder.apply_snapshot(name))

    def delete_snapshot(self, name: str) -> None:
        """Delete the snapshot with this name, else with this id."""
        self._alone("internal-snapshot-delete", lambda holder: holder.delete_snapshot(name))

    def _alone(self, operation: str, action: Callable[[HasSnapshots], _T]) -> _T:
        """Change snapshots while no handle that reaches the node has a request under way.

        :raises Busy: ``operation`` is blocked
        """
        from .formats.abilities import require_snapshots
        from .graph.blockers import check
        from .graph.live import settled

        if self.read_only:
            require_snapshots(self.node)  # what it can never do comes first
            raise ReadOnly("cannot change snapshots: the image is open read-only", where=self.filename)
        with settled(self.graph, [self]) as (node,):
            holder = require_snapshots(node)
            check(self.graph, node, operation)
            return action(holder)

    # -- looking ----------------------------------------------------------------------------------

    def extents(self, offset: int = 0, length: int | None = None) -> ExtentMap:
        """What the range is, resolved over the whole chain: column ``depth`` says which layer holds it.

        Meant for windows of up to a few GiB; see :func:`byre.graph.chain.windows` to walk a disk.
        """

        def look() -> ExtentMap:
            node = self._root.node
            count = node.size - offset if length is None else length
            if offset < 0 or count < 0 or offset + count > node.size:
                self._out_of_range("map", offset, count)
            return chain.extents(node, offset, count)

        return self.within(look)

    def within(self, action: Callable[[], _T]) -> _T:
        """The result of ``action``, during which the graph below stays as it is; for jobs that look at nodes."""
        self._enter()
        try:
            return action()
        finally:
            self._leave()

    # -- the gate ---------------------------------------------------------------------------------

    def pause(self) -> None:
        """Hold new requests back and wait until none is in flight; nests. Throttled ones do not wait for their time."""
        with self._gate:
            self._paused += 1
            if not self._in_flight:
                return
        nodes = self.graph.below(self.node)
        for node in nodes:
            node.drain_begin()
        try:
            with self._gate:
                while self._in_flight:
                    self._changed.wait()
        finally:
            for node in nodes:
                node.drain_end()

    def resume(self) -> None:
        with self._gate:
            self._paused -= 1
            self._changed.notify_all()

    def begin_batch(self) -> Node:
        """Enter the gate for several short requests, which are made of the node returned: none of them waits for
        anybody outside. The caller checks bounds and writability, and ends the batch with :meth:`end_batch`.
        """
        self._enter()
        return self._root.node

    def end_batch(self, reads: int, bytes_read: int, writes: int, bytes_written: int, started: int) -> None:
        """Count what was done since :meth:`begin_batch` and leave.

        :param started: ``perf_counter_ns()`` at the beginning; the time is shared out by the number of requests
        """
        elapsed = perf_counter_ns() - started
        stats = self.stats
        with self._gate:
            if reads:
                stats.operation_count[Stats.READ] += reads
                stats.byte_count[Stats.READ] += bytes_read
                stats.nanoseconds[Stats.READ] += elapsed * reads // (reads + writes)
            if writes:
                stats.operation_count[Stats.WRITE] += writes
                stats.byte_count[Stats.WRITE] += bytes_written
                stats.nanoseconds[Stats.WRITE] += elapsed * writes // (reads + writes)
            self._in_flight -= 1
            if self._paused:
                self._changed.notify_all()

    def _enter(self) -> None:
        with self._gate:
            if self._paused:
                self._wait_unpaused()
            self._in_flight += 1

    def _wait_unpaused(self) -> None:
        """A closed image stays paused, so that open ones need no second test."""
        while self._paused:
            self._check_open()
            self._changed.wait()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidArgument("the image is closed", where=self.filename)

    def _leave(self) -> None:
        with self._gate:
            self._in_flight -= 1
            if self._paused:
                self._changed.notify_all()

    def _change(self, kind: int, offset: int, length: int, action: Callable[[Node], None]) -> None:
        if self.read_only:
            raise ReadOnly("cannot write: the image is open read-only", where=self.filename)
        self._request(kind, offset, length, action)
        if kind != Stats.DISCARD:
            self.stats.wrote(offset + length)

    def _request(self, kind: int, offset: int, length: int, action: Callable[[Node], None]) -> None:
        """``action`` of the node there is once the gate is open: a change of the graph may have exchanged it, and its
        size may have changed."""
        started = perf_counter_ns()
        self._enter()
        try:
            node = self._root.node
            if offset < 0 or length < 0 or offset + length > node.size:
                self._out_of_range(_VERBS[kind], offset, length)
            action(node)
        except BaseException:
            self.stats.failed(kind)
            raise
        else:
            self.stats.done(kind, length, started)
        finally:
            self._leave()

    def _out_of_range(self, verb: str, offset: int, length: int) -> None:
        raise InvalidArgument(f"cannot {verb} {length} bytes at {offset:#x}: the image ends at {self.size:#x}",
                              where=self.filename)  # fmt: skip

    # -- options and life -------------------------------------------------------------------------

    def reopen(self, *, read_only: bool | None = None, cache: str | None = None,
               options: Mapping[str, object] | None = None) -> None:  # fmt: skip
        """Change options of the open image as one transaction: all layers take them, or none does.

        :param options: driver options of the top node, as at opening
        :raises ByreError: and everything is as before
        """
        from .graph.reopening import reopen
        from .opening import cache_flags

        self._check_open()
        flags = None if cache is None else cache_flags(cache)
        reopen(self, read_only=read_only, cache=flags, options=options or {})

    def close(self) -> None:
        """Wait for requests in flight, write everything back and let go. Closing twice is fine.

        Requests that come later, or are held back by a pause, are refused.

        :raises ByreError: the last write-back failed; the image is closed all the same
        """
        with self.graph.lock:
            if self._closed:
                return
            self._closed = True
            if self in self.graph.images:
                self.graph.images.remove(self)
        self.pause()
        with self._gate:
            self._changed.notify_all()
        try:
            if not self.read_only and not self.node.closed:
                self.node.flush()
        finally:
            with self.graph.lock:
                node = self.node  # now, for it may have been replaced meanwhile
                self.graph._unlink(self._root)
                if node.parents:  # else it is closed next
                    self.graph.refresh_permissions(node)
            self.graph.release(node)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    def check_idle(self) -> None:
        """:raises Busy: a request is in flight"""
        with self._gate:
            if self._in_flight:
                raise Busy("the image is in use", where=self.filename)
