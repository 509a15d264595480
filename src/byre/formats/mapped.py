"""A format node whose disk is one map over one file: the hooks go to the map, and what such formats share is here.

The map says where bytes lie (:mod:`.flatmap`, :mod:`.twolevel`); the format adds its header and what it can besides.
"""

from __future__ import annotations

from ..errors import ReadOnly
from ..io.extent import ZERO
from ..typing import TYPE_CHECKING, Protocol
from .stored import StoredFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest
    from ..io.extent import Extent
    from ..io.extentmap import ExtentMap
    from ..options import OptionValues
    from .base import Placement

__all__ = ["DiskMap", "MappedNode"]


class DiskMap(Protocol):
    """Where the clusters of a disk lie. Every method is called with the node's lock held.

    :ivar dirty: something is to be written back
    :ivar backed: what is not allocated reads from a layer below
    :ivar freed: (host, clusters) that the tables in memory no longer name
    """

    backed: bool
    freed: list[tuple[int, int]]

    @property
    def dirty(self) -> bool: ...
    def lookup(self, offset: int, length: int) -> list[Extent]: ...
    def lookup_all(self, offset: int, length: int) -> ExtentMap: ...
    def in_place(self, offset: int, length: int) -> int: ...
    def reserve(self, offset: int, length: int) -> list[Placement]: ...
    def publish(self, placements: Sequence[Placement]) -> None: ...
    def cancel(self, placements: Sequence[Placement]) -> None: ...
    def unmap(self, offset: int, length: int, zero: bool, keep: bool) -> int: ...
    def write_back(self) -> None: ...
    def release(self, host: int, count: int) -> None: ...
    def holders(self) -> tuple[object, ...]: ...


class MappedNode(StoredFormat):
    """An open image with one map. Guarded by ``lock``: the map and the header.

    :ivar file: where everything lies
    :ivar map: set by the format before the node is used
    :ivar dirty: the header says that the image was not closed; ``None`` where a format has no such notion
    :ivar marks_every_write: :meth:`start_writing` comes before any write, not only before those that allocate
    """

    map: DiskMap
    dirty: bool | None = None
    marks_every_write = False

    def __init__(self, request: OpenRequest, file: Node, flags: OpenFlags) -> None:
        super().__init__(file, request.options, flags, name=request.name)
        self._writing = False

    def attach(self, request: OpenRequest) -> None:
        """Join the file; the last step of opening but for what may fail behind it."""
        request.opener.adopt(self)  # so that a failure from here on leaves no edge behind
        self.sources = (request.opener.graph.attach(self, "file", self.file, "data"),)

    def holders(self) -> tuple[object, ...]:
        return self.map.holders()

    # -- what a format adds -----------------------------------------------------------------------

    def start_writing(self) -> None:
        """Before the first change: say in the header that the image is open, where the format can; lock held."""

    def settle(self) -> None:
        """Everything is on disk, nothing under way: the header may say that the image is closed; lock held."""

    # -- the format contract ----------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> list[Extent]:
        return self.map.lookup(offset, length)

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        return self.map.lookup_all(offset, length)

    def in_place(self, offset: int, length: int) -> int:
        if self.cipher is not None or self.report is not None or (self.marks_every_write and not self._writing):
            return -1
        return self.map.in_place(offset, length)

    def before_change(self) -> None:
        """First thing in every hook that changes something; lock held."""
        self._know_backing()
        if not self._writing:
            self.guarded(self.start_writing)
            self._writing = True

    def _know_backing(self) -> None:
        # Also where the backing file is not open now: it would show through another time.
        self.map.backed = self.backing is not None or bool(self.backing_name)

    def reserve(self, offset: int, length: int) -> list[Placement]:
        self._know_backing()
        placements = self.map.reserve(offset, length)
        if not self._writing and (self.marks_every_write or any(placement.fresh for placement in placements)):
            self.before_change()
        return placements

    def publish(self, placements: Sequence[Placement]) -> None:
        self.guarded(lambda: self.map.publish(placements))

    def cancel(self, placements: Sequence[Placement]) -> None:
        self.map.cancel(placements)

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        self.before_change()
        return self.map.unmap(offset, length, kind == ZERO, keep)

    def write_back(self) -> None:
        """Tables, and then what they no longer name is given back: to the file system, and to later writes."""
        self.guarded(self._write_back)

    def _write_back(self) -> None:
        if self.map.dirty:
            self.map.write_back()
        freed, self.map.freed = self.map.freed, []
        if not freed:
            return
        # Once no durable table names a cluster, it may be punched and reused.
        self.file.flush()
        for host, count in freed:
            if self.pass_discard:
                self.file.discard(host, count * self.cluster_size)
            self.inflight.when_clear(lambda host=host, count=count: self.map.release(host, count))  # type: ignore[misc]

    # -- reopening, closing, permissions ----------------------------------------------------------

    def check_writable(self, what: str) -> None:
        """:raises ReadOnly: the image is open read-only"""
        if self.read_only:
            raise ReadOnly(f"cannot {what}: the image is open read-only", where=self.filename)

    def close_cleanly(self) -> None:
        """Everything to disk, and the header says so."""
        self.flush()
        with self.lock:
            if self.failure is None:
                self.guarded(self.settle)
                self._writing = False

    def inactivate(self) -> None:
        if not self.read_only and self.failure is None:
            self.close_cleanly()

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if not self.read_only:
            self.close_cleanly()
        return flags, options
