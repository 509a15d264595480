"""Node: one element of the block graph.

Three kinds exist: protocol nodes own something outside the graph, format nodes say where an
image's bytes lie inside their children, filter nodes change when or whether a request happens.
Offsets and lengths are bytes, always, and any byte range is accepted.
"""

from __future__ import annotations

import threading
from time import perf_counter_ns

from ..errors import NotSupported
from ..io.extent import DATA, FUA, NO_FALLBACK, Extent
from ..typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..bitmaps.tracking import Tracker
    from ..io.extentmap import ExtentMap
    from ..options import OptionValues
    from .child import Child
    from .opening import OpenFlags

__all__ = [
    "PERM_ALL",
    "PERM_NAMES",
    "PERM_READ",
    "PERM_RESIZE",
    "PERM_WRITE",
    "PERM_WRITE_UNCHANGED",
    "Limits",
    "Node",
    "Stats",
]

# The four permissions, with the bit numbers QEMU's image locks use on disk.
PERM_READ: Final = 1
PERM_WRITE: Final = 2
PERM_WRITE_UNCHANGED: Final = 4
PERM_RESIZE: Final = 8
PERM_ALL: Final = 15
PERM_NAMES: Final = {PERM_READ: "consistent read", PERM_WRITE: "write", PERM_WRITE_UNCHANGED: "write unchanged",
                     PERM_RESIZE: "resize"}  # fmt: skip

_ZEROES = bytes(1 << 20)


class Limits(NamedTuple):
    """What a node can take in one request, in bytes; 0 means no limit.

    ``request_alignment`` is what the node needs to work without a bounce buffer; callers need not keep it.
    """

    request_alignment: int = 1
    max_transfer: int = 0
    discard_alignment: int = 1
    zero_alignment: int = 1
    memory_alignment: int = 1


class Stats:
    """Requests seen by a node: count, bytes, failures and nanoseconds by kind; the highest offset written.

    Guarded by: its own lock (a leaf), or the one handed to the constructor.
    """

    KINDS: Final = ("read", "write", "zeroes", "discard", "flush")
    READ: Final = 0
    WRITE: Final = 1
    ZEROES: Final = 2
    DISCARD: Final = 3
    FLUSH: Final = 4

    __slots__ = ("_lock", "byte_count", "failed_count", "highest_written", "nanoseconds", "operation_count")

    def __init__(self, lock: threading.Lock | None = None) -> None:
        self._lock = lock or threading.Lock()
        self.operation_count = [0] * 5
        self.byte_count = [0] * 5
        self.nanoseconds = [0] * 5
        self.failed_count = [0] * 5
        self.highest_written = 0

    def done(self, kind: int, length: int, started: int) -> None:
        """One request of ``kind`` over ``length`` bytes ended; ``started`` is its ``perf_counter_ns()``."""
        elapsed = perf_counter_ns() - started
        with self._lock:
            self.operation_count[kind] += 1
            self.byte_count[kind] += length
            self.nanoseconds[kind] += elapsed

    def wrote(self, end: int) -> None:
        with self._lock:
            if end > self.highest_written:
                self.highest_written = end

    def failed(self, kind: int) -> None:
        with self._lock:
            self.failed_count[kind] += 1

    def as_dict(self) -> dict[str, dict[str, int]]:
        """``{kind: {operations, bytes, nanoseconds, failed}}``, a consistent snapshot."""
        with self._lock:
            return {
                name: {
                    "operations": self.operation_count[i],
                    "bytes": self.byte_count[i],
                    "nanoseconds": self.nanoseconds[i],
                    "failed": self.failed_count[i],
                }
                for i, name in enumerate(self.KINDS)
            }


class Node:
    """One element of the graph.

    Reading past the end gives zeroes; writing past the end of a protocol node grows it. Bounds for
    callers outside the graph are checked by :class:`byre.image.Image`. Buffers are contiguous
    byte views (``memoryview`` of format "B").

    :ivar name: node name, unique in its graph
    :ivar driver: the catalog name
    :ivar filename: what to call it in messages
    :ivar children: the edges down, by name ("file", "backing", "data-file", ...)
    """

    driver = ""
    kind = ""  # "protocol", "format" or "filter"
    #: Whether ``debug_event`` does anything here or below; a format asks its file child once, when it is opened.
    takes_events = False
    #: Dirty bitmaps that writes to this node mark; ``None`` where there is none.
    tracker: Tracker | None = None
    #: Requests wait for another process: several at once get on, one behind the other do not.
    remote = False
    layered = False  # a FormatNode, whose reads go layer by layer through io/engine.py
    #: Small writes end in memory as a rule: who must not wait for a disk may make them itself.
    buffered = False

    def __init__(self, *, name: str = "", filename: str = "", read_only: bool = False) -> None:
        self.name = name
        self.filename = filename
        self.read_only = read_only
        self.children: dict[str, Child] = {}
        self.parents: list[Child] = []
        self.limits = Limits()
        self.stats = Stats()
        self.closed = False
        self.options: dict[str, object] = {}
        #: Operations that something else excludes for now, and why: see ``graph/blockers.py``.
        self.blockers: dict[str, tuple[str, ...]] = {}

    # -- what a node must answer ------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Length in bytes."""
        raise NotImplementedError

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        raise NotImplementedError

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        """Write ``buffer`` at ``offset``; with ``FUA`` it is durable on return."""
        raise NotSupported(f"driver {self.driver!r} cannot write", where=self.filename)

    def flush(self) -> None:
        """What was written before the call is durable when it returns."""

    # -- with a default ---------------------------------------------------------------------------

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill several buffers from consecutive bytes."""
        for buffer in buffers:
            self.read_into(offset, buffer)
            offset += len(buffer)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` if that takes no waiting, because the bytes are in memory already. Statistics leave it out.

        :returns: False where they are not, or nobody can tell; the buffer may hold anything then
        """
        return False

    def direct_range(self, offset: int, length: int) -> tuple[int, int, Callable[[], None] | None] | None:
        """(descriptor, offset, give back) where a range can be read past the page cache, into memory at a multiple of
        4 KiB; or ``None``. What is to be given back, once the read has ended, keeps the place from other uses.
        """
        return None

    def file_range(self, offset: int, length: int) -> tuple[int, int] | None:
        """(descriptor, offset) of an open file in which the whole range lies as it is and where it stays; or ``None``.

        The descriptor is the node's: whoever uses it after the request duplicates it.
        """
        return None

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        """Write several buffers to consecutive bytes, in one request where the node can."""
        for buffer in buffers:
            self.write_from(offset, buffer, flags & ~FUA)
            offset += len(buffer)
        if flags & FUA:
            self.flush()

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make a range read as zeroes; by default by writing them.

        :raises NotSupported: with ``NO_FALLBACK`` where only writing zeroes would do
        """
        if flags & NO_FALLBACK:
            raise NotSupported(f"driver {self.driver!r} cannot zero a range without writing it", where=self.filename)
        zeroes = memoryview(_ZEROES)
        while length > 0:
            step = min(length, len(zeroes))
            self.write_from(offset, zeroes[:step])
            offset += step
            length -= step
        if flags & FUA:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        """The range is no longer needed; its content may or may not change. Best effort, may do nothing."""

    def block_status(self, offset: int, length: int) -> Extent:
        """What this layer holds from ``offset``: one extent that starts there and is at most ``length`` long."""
        return Extent(offset, length, DATA, offset)

    def extents(self, offset: int, length: int) -> ExtentMap:
        """This layer's extents over the whole range, coalesced."""
        from ..io.extentmap import ExtentMap

        rows = []
        end = offset + length
        while offset < end:
            row = self.block_status(offset, end - offset)
            rows.append(row)
            offset = row.end
        return ExtentMap.from_extents(rows).coalesced()

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        """Change the length; growth reads as zeroes.

        :param preallocation: "off", "metadata", "falloc" or "full", for the new space
        """
        raise NotSupported(f"driver {self.driver!r} cannot change its size", where=self.filename)

    def populate(self, offset: int, length: int, *, base: Node | None = None, everything: bool = False) -> int:
        """Have this layer itself hold what it shows of the layers below it; see :func:`byre.graph.populate.populate`.

        :returns: bytes that it did not hold before; 0 where a node holds everything anyway
        """
        return 0

    def refresh_size(self) -> None:
        """Look again how long the thing outside is."""

    @property
    def has_zero_init(self) -> bool:
        """Whether a newly created or grown part reads as zeroes without writing them."""
        return False

    def allocated_size(self) -> int:
        """Bytes occupied on the host, ``-1`` if unknown."""
        file = self.children.get("file")
        return file.node.allocated_size() if file else -1

    # -- permissions ------------------------------------------------------------------------------

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        """(used, shared) this node asks of ``child`` when its own parents use and share the given sets."""
        raise NotImplementedError

    def set_permissions(self, used: int, shared: int) -> None:
        """The cumulative permissions of all parents changed; a protocol node adapts its locks.

        :raises Busy: somebody outside the graph holds what is asked
        """

    def child_moved(self, child: Child, before: Node) -> None:
        """``child`` leads to another node now; no request is under way.

        :param before: where it led until now
        :raises NotSupported: the node holds on to what the old one was
        """

    # -- reopening --------------------------------------------------------------------------------

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        """Make ready for other flags and options; nothing changes before :meth:`reopen_commit`. Requests are held back.

        :raises ByreError: it is not possible
        """
        return flags

    def reopen_commit(self, token: object) -> None:
        """Take over what ``reopen_prepare`` returned; cannot fail."""
        self.read_only = bool(getattr(token, "read_only", self.read_only))

    def reopen_abort(self, token: object) -> None:
        """Let go of what ``reopen_prepare`` returned."""

    def reopen_finish(self) -> None:
        """All nodes and permissions have changed; what must be done before the first write is done now.

        :raises ByreError: it cannot be done; everything is changed back
        """

    # -- life -------------------------------------------------------------------------------------

    def drain_begin(self) -> None:
        """Somebody above waits for the requests under way: hold none back on purpose from now on. Nests."""

    def drain_end(self) -> None:
        """The end of :meth:`drain_begin`."""

    def chain_opened(self) -> None:
        """Everything below is open, backing files as well.

        :raises ByreError: something the node needs is not there; it is closed then
        """

    def inactivate(self) -> None:
        """Write back everything; called before the last close."""

    def close(self) -> None:
        """Release what the node owns; its children are closed by the graph. Closing twice is fine."""
        self.closed = True

    # -- fault injection --------------------------------------------------------------------------

    def debug_event(self, name: str) -> None:
        """The parent is about to do ``name`` ("l2_load", "cluster_alloc", ...; see filters/faults.py): may block."""
