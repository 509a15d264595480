"""The format contract: a format answers where, the engine moves the bytes.

A read-only format writes ``lookup`` (and ``decompress``); a writable one adds ``reserve``,
``publish``, ``cancel``, ``unmap`` and ``write_back``. All hooks except ``decompress`` are called
with ``self.lock`` held; ``io/engine.py`` does alignment, copy-on-write, claims and tickets.
"""

from __future__ import annotations

import threading

from ..errors import NotSupported, OutOfService
from ..graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED, Node, Stats
from ..io import cached, engine
from ..io.extent import UNALLOCATED, Extent
from ..io.inflight import InFlight
from ..typing import TYPE_CHECKING, Final, NamedTuple, Protocol
from ..units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..graph.child import Child
    from ..io.extentmap import ExtentMap

__all__ = ["Cipher", "FormatNode", "Placement"]

_MUCH: Final = 8 * MIB
"""So much takes longer to flush than one flush more."""


class Placement(NamedTuple):
    """Where guest bytes ``[offset, offset + length)`` may be written.

    A fresh placement is aligned to what the format can link (cluster or subcluster); the engine fills
    what the request does not cover with what the range reads as now, and ``publish`` links it.

    :ivar source: index into ``FormatNode.sources``
    :ivar fresh: newly allocated, to be published; otherwise written in place
    :ivar zeroed: the host range is known to read as zeroes, so zeroes need not be written
    :ivar blank: what the request does not cover reads as zeroes now
    :ivar token: the format's own note
    """

    offset: int
    length: int
    host: int
    source: int = 0
    fresh: bool = False
    zeroed: bool = False
    blank: bool = False
    token: object = None


class Cipher(Protocol):
    """Encrypts whole sectors in place. Thread-safe.

    :ivar by_host: ``position`` is the host offset, not that on the disk
    :ivar sector_size: a power of two; the engine asks for whole sectors only
    """

    by_host: bool
    sector_size: int

    def encrypt(self, position: int, buffer: bytearray | memoryview) -> None: ...
    def decrypt(self, position: int, buffer: bytearray | memoryview) -> None: ...


class FormatNode(Node):
    """A node that maps guest ranges to ranges of its data children.

    Guarded by ``lock``: tables, allocator, claims, tickets, ``size``, ``failure``.

    :ivar cluster_size: the unit of allocation, bytes
    :ivar zero_unit: what ``unmap`` can turn into ZERO: the cluster, or the subcluster
    :ivar detect_zeroes: "off", "on" or "unmap": writes of zeroes become zero writes
    :ivar pass_discard: discards are carried out rather than ignored
    :ivar sources: the data children extents refer to by index
    :ivar backing: the layer below, if any
    :ivar failure: set once a metadata write or flush failed; from then on every request fails with EIO
    """

    kind = "format"
    layered = True
    #: Whether images can say of which format their backing file is; what cannot be said is probed without a word.
    records_backing_format = True

    def __init__(self, *, name: str = "", filename: str = "", read_only: bool = False) -> None:
        super().__init__(name=name, filename=filename, read_only=read_only)
        self.lock = threading.Lock()
        self.inflight = InFlight(self.lock)
        self.cluster_size = 65536
        self.zero_unit = 65536
        self.detect_zeroes = "off"
        self.pass_discard = True
        self.sources: tuple[Child, ...] = ()
        self.cipher: Cipher | None = None
        #: Requests are widened to multiples of this plus one, in :mod:`byre.io.sectors`; 0 without a cipher.
        self.sector_mask = 0
        self.failure: BaseException | None = None
        #: Tells a fault filter below what is about to happen; ``None`` where there is none.
        self.report: Callable[[str], None] | None = None
        self._size = 0
        #: Bytes written to the sources when they were last flushed ahead; a guess where two do that at once.
        self._flushed = 0
        #: Backing file as the image records it; opening attaches it. "" means none.
        self.backing_name = ""
        self.backing_format = ""

    @property
    def size(self) -> int:
        return self._size

    @property
    def backing(self) -> Child | None:
        return self.children.get("backing")

    def use_cipher(self, cipher: Cipher | None) -> None:
        """Encrypt what is in DATA extents from now on; called while no request is under way."""
        self.cipher = cipher
        self.sector_mask = cipher.sector_size - 1 if cipher is not None else 0

    # -- hooks ------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> list[Extent]:
        """Extents from ``offset``: consecutive, within ``[offset, offset + length)``, may stop early, never empty."""
        raise NotImplementedError

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        """The whole range in bulk, coalesced."""
        from ..io.extentmap import ExtentMap

        rows: list[Extent] = []
        end = offset + length
        while offset < end:
            rows += self.lookup(offset, end - offset)
            offset = rows[-1].end
        return ExtentMap.from_extents(rows).coalesced()

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        """Fill ``buffer`` with the guest bytes of a COMPRESSED extent (which may be part of a cluster)."""
        raise NotSupported(f"driver {self.driver!r} has no compressed clusters", where=self.filename)

    def cached_host(self, offset: int, length: int) -> int:
        """Where the whole range lies in ``sources[0]``, as it is and in one piece: -1 if not, or if that would take I/O
        to find out; -2 if all of it is UNALLOCATED. A short cut past :meth:`lookup`.
        """
        return -1

    def in_place(self, offset: int, length: int) -> int:
        """The host offset in ``sources[0]`` where the whole range may be written as it is, -1 if it is not that simple.

        A short cut past :meth:`reserve`; a node with a cipher or a fault filter below does without it.
        """
        return -1

    def reserve(self, offset: int, length: int) -> list[Placement]:
        """Where these bytes may go, in order, covering the range; allocates, does not link. May stop early."""
        raise NotSupported(f"driver {self.driver!r} cannot write", where=self.filename)

    def publish(self, placements: Sequence[Placement]) -> None:
        """The bytes of these fresh placements are there: link them."""
        raise NotSupported(f"driver {self.driver!r} cannot write", where=self.filename)

    def cancel(self, placements: Sequence[Placement]) -> None:
        """They are not: give the space back."""
        raise NotSupported(f"driver {self.driver!r} cannot write", where=self.filename)

    def prepare_compressed(self, offset: int, end: int) -> None:
        """Compressed clusters are about to be written there: what linking them will need may be allocated first."""

    def reserve_compressed(self, lengths: Sequence[int]) -> list[int]:
        """Host offsets for compressed clusters of these lengths, packed."""
        raise NotSupported(f"driver {self.driver!r} has no compressed clusters", where=self.filename)

    def publish_compressed(self, offset: int, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        """The compressed clusters from guest ``offset`` are there: link them."""
        raise NotSupported(f"driver {self.driver!r} has no compressed clusters", where=self.filename)

    def cancel_compressed(self, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        """They are not: give the space back."""
        raise NotSupported(f"driver {self.driver!r} has no compressed clusters", where=self.filename)

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        """Whole clusters from ``offset`` become ZERO or UNALLOCATED.

        :param keep: ZERO clusters keep their space
        :returns: bytes done, from ``offset``; 0 if the format cannot (the engine then writes zeroes)
        """
        return 0

    def write_back(self) -> None:
        """Dirty tables to the child, in safe order."""

    def write_back_apart(self) -> bool:
        """The same, called without the lock, which is not held while the disk is waited for.

        Takes the node out of service itself if that fails.

        :returns: False if :meth:`write_back` has to be called
        """
        return False

    # -- requests: all in the engine --------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        engine.read(self, offset, buffer)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        engine.write(self, offset, buffer, flags)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        return cached.read_cached(self, offset, buffer)

    def direct_range(self, offset: int, length: int) -> tuple[int, int, Callable[[], None] | None] | None:
        return cached.direct_range(self, offset, length)

    def file_range(self, offset: int, length: int) -> tuple[int, int] | None:
        return cached.file_range(self, offset, length)

    @property
    def buffered(self) -> bool:  # type: ignore[override]
        return all(child.node.buffered for child in self.sources)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        # One request: pieces of a cluster written one by one would each copy the rest of it.
        engine.write(self, offset, buffers[0] if len(buffers) == 1 else memoryview(b"".join(buffers)), flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        engine.write_zeroes(self, offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        engine.discard(self, offset, length)

    def flush(self) -> None:
        self._flush_ahead()
        engine.flush(self)

    def _flush_ahead(self) -> None:
        """Where much was written, the data goes first, with no lock held: nobody waits for it. The tables are few."""
        written = sum(child.node.stats.byte_count[Stats.WRITE] for child in self.sources)
        if self.read_only or written - self._flushed < _MUCH:
            return
        self._flushed = written
        try:
            for child in self.sources:
                child.node.flush()
        except BaseException as error:
            with self.lock:
                self.fail_stop(error)
            raise

    def block_status(self, offset: int, length: int) -> Extent:
        if offset >= self._size:
            return Extent(offset, length, UNALLOCATED)
        with self.lock:
            self.check_failure()
            first, *rest = self.lookup(offset, min(length, self._size - offset))
        end = first.end
        for other in rest:
            if other.kind != first.kind or other.source != first.source or first.kind > UNALLOCATED:
                break
            if other.host != (first.host + end - offset if first.host >= 0 else first.host):
                break
            end = other.end
        return first._replace(length=end - offset)

    def extents(self, offset: int, length: int) -> ExtentMap:
        with self.lock:
            self.check_failure()
            return self.lookup_all(offset, length)

    def populate(self, offset: int, length: int, *, base: Node | None = None, everything: bool = False) -> int:
        from ..graph.populate import populate

        return populate(self, offset, length, base=base, everything=everything)

    # -- failure ----------------------------------------------------------------------------------

    def check_failure(self) -> None:
        """:raises OutOfService: a metadata write or flush failed earlier"""
        if self.failure is not None:
            raise OutOfService(
                f"the image was taken out of service after a metadata failure ({self.failure})",
                where=self.filename,
                hint="close it and open it again; what was flushed is safe",
            )

    def fail_stop(self, error: BaseException) -> None:
        """A metadata write or flush failed: no more metadata writes, every request fails from now on."""
        if self.failure is None:
            self.failure = error

    # -- permissions ------------------------------------------------------------------------------

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if child.name == "backing":
            below = PERM_READ | PERM_WRITE_UNCHANGED
            if shared & PERM_WRITE:
                below |= PERM_WRITE | PERM_RESIZE
            return used & PERM_READ, below
        need = PERM_READ
        if not self.read_only:
            need |= PERM_WRITE | PERM_RESIZE
        # Nobody else may change what this node's tables describe.
        return need, PERM_ALL & ~(PERM_WRITE | PERM_RESIZE)

    def holders(self) -> Iterable[object]:
        """What besides the node uses a file below, by its attribute ``file``; some also tell it by ``report``."""
        return ()

    def child_moved(self, child: Child, before: Node) -> None:
        if child.name == "backing":
            return
        edges = (edge for name, edge in self.children.items() if name != "backing")
        self.report = next((edge.node.debug_event for edge in edges if edge.node.takes_events), None)
        for part in (self, *self.holders()):
            if getattr(part, "file", None) is before:
                part.file = child.node  # type: ignore[attr-defined]
            if hasattr(part, "report"):
                part.report = self.report

    def inactivate(self) -> None:
        if not self.read_only and self.failure is None:
            self.flush()
