"""VmdkNode: a VMDK disk as a node; joins its extents to the format contract.

Owns the content ID and the order of what is written first and last. Opening is :mod:`.opening`, writing into sparse
extents :mod:`.allocation`, checking :mod:`.check`.
"""

from __future__ import annotations

from ...errors import Corrupt, ImageError, InvalidArgument, NotSupported, ReadOnly
from ...graph.chain import skip_filters
from ...io import engine
from ...io.buffers import is_zero
from ...io.extent import FUA, MAY_UNMAP, UNALLOCATED, Extent
from ...io.extent import ZERO as KIND_ZERO
from ...typing import TYPE_CHECKING, Final, cast
from ...units import SECTOR
from ..base import Placement
from ..stored import StoredFormat
from .allocation import Allocator, aligned
from .extents import DiskExtent, PlainExtent, SparseExtent, find_extent
from .layout import ZERO_GRAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ...graph.child import Child
    from ...graph.node import Node
    from ...graph.opening import OpenFlags
    from ...io.extentmap import ExtentMap
    from ...jobs.job import Control
    from ...options import OptionValues
    from ..abilities import CheckResult
    from .descriptor import Descriptor
    from .layout import SparseHeader

__all__ = ["VmdkNode"]

_PLAIN_UNIT: Final = 65536
_GRAINS_AT_ONCE: Final = 64


class VmdkNode(StoredFormat):
    """An open disk of any kind.

    Guarded by ``lock``: extents, content ID.

    :ivar file: the descriptor, or the extent that the descriptor is embedded in
    :ivar descriptor: as it was when the disk was opened; ``None`` for a lone extent without one
    :ivar descriptor_at: where it begins in ``file``, bytes
    :ivar create_type: what kind of disk, in the specification's words
    :ivar extents: in the order of the disk, without gaps
    :ivar headers: of hosted sparse extents, by their index
    :ivar cid: the content ID now
    :ivar refusal: why the disk cannot be written, "" if it can
    """

    driver = "vmdk"

    def __init__(self, file: Node, descriptor: Descriptor | None, create_type: str, options: OptionValues,
                 flags: OpenFlags, *, descriptor_at: int = 0, name: str = "") -> None:  # fmt: skip
        super().__init__(file, options, flags, name=name)
        self.descriptor = descriptor
        self.descriptor_at = descriptor_at
        self.create_type = create_type
        self.extents_of_disk: list[DiskExtent] = []
        self.headers: dict[int, SparseHeader] = {}
        self.refusal = ""
        self.cid = descriptor.cid if descriptor else 0xFFFFFFFF
        self.parent_cid = descriptor.parent_cid if descriptor else 0xFFFFFFFF
        if descriptor is not None and descriptor.parent_name:
            self.backing_name, self.backing_format = descriptor.parent_name, "vmdk"
        self.compression_level: int | None = None
        self._starts: list[int] = []
        self._only: DiskExtent | None = None
        self._in_place: SparseExtent | None = None
        self._compress: Callable[[memoryview], bytes] | None = None
        self._parent: Node | None = None
        self._writing = False

    def use_extents(self, extents: list[DiskExtent]) -> None:
        """The extents of the disk, all open as far as they are to be."""
        self.extents_of_disk = extents
        self._starts = [extent.start for extent in extents]
        self._size = extents[-1].end if extents else 0
        self._only = extents[0] if len(extents) == 1 else None
        grains = {extent.grain for extent in extents if extent.grain}
        self.cluster_size = max(grains, default=_PLAIN_UNIT)
        self.zero_unit = max(grains, default=1)
        self.table_span = max((extent.span for extent in extents if isinstance(extent, SparseExtent)), default=0)

    def holders(self) -> Iterator[object]:
        for extent in self.extents_of_disk:
            yield extent
            if isinstance(extent, SparseExtent):
                yield from (extent.tables, extent.allocator)

    # -- what the disk is -------------------------------------------------------------------------

    @property
    def needs_compressed_writes(self) -> bool:
        """Nothing but whole grains, each once, can be written."""
        return self._only is not None and self._only.compressed

    @property
    def shown_cluster_size(self) -> int:
        """The unit of allocation, where all extents have the same; 0 otherwise."""
        return self.extents_of_disk[0].grain if self.uniform and self.extents_of_disk else 0

    @property
    def uniform(self) -> bool:
        """Whether all extents are of one kind."""
        return len({(extent.grain, extent.compressed) for extent in self.extents_of_disk}) <= 1

    @property
    def dirty(self) -> bool | None:
        return False if self.uniform else None

    @property
    def has_zero_init(self) -> bool:
        plain = (extent.file for extent in self.extents_of_disk if isinstance(extent, PlainExtent))
        return all(file is not None and file.has_zero_init for file in plain)

    def has_holes(self) -> bool:
        return any(isinstance(extent, PlainExtent) for extent in self.extents_of_disk)

    def allocated_size(self) -> int:
        nodes = {id(child.node): child.node for name, child in self.children.items() if name != "backing"}
        sizes = [node.allocated_size() for node in nodes.values()]
        return -1 if -1 in sizes else sum(sizes)

    # -- the parent -------------------------------------------------------------------------------

    @property
    def backing(self) -> Child | None:
        """The layer below.

        :raises ImageError: it was changed since this disk was put on top of it
        """
        child = self.children.get("backing")
        if child is not None and child.node is not self._parent:
            self._check_parent(child)
        return child

    def _check_parent(self, child: Child) -> None:
        parent = skip_filters(child.node)
        if not isinstance(parent, VmdkNode):
            raise ImageError(f"the parent {parent.filename!r} is {parent.driver}, it must be vmdk", where=self.filename)
        if parent.cid != self.parent_cid:
            raise ImageError(f"the parent {parent.filename!r} has content ID {parent.cid:08x}, expected is "
                             f"{self.parent_cid:08x}: it was changed after this disk was put on top of it",
                             where=self.filename)  # fmt: skip
        self._parent = child.node

    def accept_changes_below(self) -> None:
        from .writing import record_parent

        child = self.children["backing"]
        parent = skip_filters(child.node)
        if not isinstance(parent, VmdkNode):
            return
        with parent.lock:
            parent.begin_change()
        with self.lock:
            self.guarded(lambda: record_parent(self, parent.cid))
        self._parent = child.node

    # -- looking ----------------------------------------------------------------------------------

    def extent_at(self, offset: int) -> DiskExtent:
        return self._only or self.extents_of_disk[find_extent(self._starts, offset)]

    def lookup(self, offset: int, length: int) -> list[Extent]:
        extent = self.extent_at(offset)
        return extent.lookup(offset, min(length, extent.end - offset))

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        from ...io.extentmap import ExtentMap
        from .bulk import lookup_all

        parts: list[ExtentMap] = []
        end = offset + length
        while offset < end:
            extent = self.extent_at(offset)
            stop = min(end, extent.end)
            parts += lookup_all(extent, offset, stop - offset)
            offset = stop
        return ExtentMap.concatenate(parts).coalesced()

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        from .compression import decompress, read_grain

        index = find_extent(self._starts, extent.offset)
        whole = self.extents_of_disk[index]
        assert whole.file is not None
        skip = (extent.offset - whole.start) % whole.grain
        try:
            data = read_grain(whole.file, extent.host, whole.grain, markers=self.headers[index].markers)
            if len(buffer) == whole.grain:
                decompress(data, buffer)
                return
            grain = memoryview(bytearray(whole.grain))
            decompress(data, grain)
        except Corrupt as error:
            error.message = f"cannot read the grain at guest offset {extent.offset - skip:#x}: {error.message}"
            error.where = error.where or self.filename
            raise
        buffer[:] = grain[skip : skip + len(buffer)]

    # -- writing ----------------------------------------------------------------------------------

    def begin_change(self) -> None:
        """Another content ID is on disk before anything else: who relies on the old content must notice."""
        if not self._writing:
            self.guarded(self._start_writing)

    def _start_writing(self) -> None:
        from .writing import start

        start(self)
        self._writing = True
        only = self._only
        plain = isinstance(only, SparseExtent) and only.source == 0 and not only.compressed and self.report is None
        self._in_place = only if plain else None  # type: ignore[assignment]

    def in_place(self, offset: int, length: int) -> int:
        extent = self._in_place
        if extent is None:
            return -1
        host = extent.in_place(offset, length)
        return host if extent.allocator is not None and host >= extent.allocator.floor else -1

    def allocator(self, extent: DiskExtent) -> Allocator | None:
        """Where ``extent`` grows; ``None`` for extents without grains.

        :raises ReadOnly: it cannot be written
        """
        if not extent.writable or type(extent) is DiskExtent:
            raise ReadOnly(f"the extent at {extent.start:#x} ({extent.type}) of the disk cannot be written",
                           where=self.filename)  # fmt: skip
        return extent.allocator if isinstance(extent, SparseExtent) else None

    def reserve(self, offset: int, length: int) -> list[Placement]:
        self.begin_change()
        extent = self.extent_at(offset)
        length = min(length, extent.end - offset)
        allocator = self.allocator(extent)
        if allocator is None:
            (row,) = extent.lookup(offset, length)
            return [Placement(offset, length, row.host, row.source)]
        if extent.compressed:
            raise NotSupported("in a stream-optimized disk each grain can be written once, as a whole",
                               where=self.filename)  # fmt: skip
        return allocator.reserve(offset, length, has_backing=self.backing is not None)

    def publish(self, placements: Sequence[Placement]) -> None:
        def link() -> None:
            for placement in placements:
                allocator = self.allocator(self.extent_at(placement.offset))
                assert allocator is not None
                allocator.publish(placement)

        self.guarded(link)

    def cancel(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            allocator = self.allocator(self.extent_at(placement.offset))
            assert allocator is not None
            allocator.cancel(placement)

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        extent = self.extent_at(offset)
        inside = min(length, extent.end - offset)
        if isinstance(extent, PlainExtent):
            return self._unmap_plain(extent, offset, inside, kind, keep)
        if not isinstance(extent, SparseExtent):
            return inside
        start, whole = aligned(extent, offset, inside)
        # The engine relies on a unit being done as a whole.
        if start != offset or (len(self._starts) > 1 and whole < min(length, self.zero_unit)):
            return 0
        return self._unmap_grains(extent, offset, whole, kind, keep)

    def _unmap_plain(self, extent: PlainExtent, offset: int, length: int, kind: int, keep: bool) -> int:
        self.begin_change()
        self.allocator(extent)  # refuses what cannot be written
        assert extent.file is not None
        host = extent.base + offset - extent.start
        if kind == UNALLOCATED:
            extent.file.discard(host, length)
        else:
            extent.file.write_zeroes(host, length, 0 if keep else MAY_UNMAP)
        return length

    def _unmap_grains(self, extent: SparseExtent, offset: int, length: int, kind: int, keep: bool) -> int:
        """As :meth:`unmap`, for whole grains."""
        over = bool(self.backing_name) or "backing" in self.children
        if over and not extent.zero_grains:
            return 0  # the parent would show through
        if extent.compressed:
            # What was written stays.
            length = extent.free_run(offset, length) if kind == KIND_ZERO else 0
        elif keep and kind == KIND_ZERO and not extent.zero_grains:
            return extent.free_run(offset, length)
        if not length:
            return 0
        self.begin_change()
        allocator = self.allocator(extent)
        assert allocator is not None
        entry = ZERO_GRAIN if extent.zero_grains and (kind == KIND_ZERO or over) else 0
        done = 0

        def change() -> None:
            nonlocal done
            done = allocator.unmap(offset, length, entry)

        self.guarded(change)
        return done

    # -- streams ----------------------------------------------------------------------------------

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        if not self.needs_compressed_writes or self.read_only:
            engine.write(self, offset, buffer, flags)
        elif self.detect_zeroes != "off" and is_zero(buffer):
            engine.write_zeroes(self, offset, len(buffer), flags)
        else:
            self._write_grains(offset, buffer)
            if flags & FUA:
                self.flush()

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self.write_from(offset, buffers[0] if len(buffers) == 1 else memoryview(b"".join(buffers)), flags)

    def _write_grains(self, offset: int, buffer: memoryview) -> None:
        """Whole grains, compressed here, some at a time."""
        grain = self.cluster_size
        if offset % grain or (len(buffer) % grain and offset + len(buffer) < self._size):
            raise InvalidArgument(f"a stream-optimized disk is written in whole grains of {grain} bytes, not "
                                  f"{len(buffer)} bytes at {offset:#x}", where=self.filename)  # fmt: skip
        for start in range(0, len(buffer), grain * _GRAINS_AT_ONCE):
            part = buffer[start : start + grain * _GRAINS_AT_ONCE]
            payloads = [cast("bytes", self.compress(part[at : at + grain])) for at in range(0, len(part), grain)]
            self.write_compressed_clusters(offset + start, payloads)

    def compress(self, buffer: memoryview) -> bytes | None:
        """One grain compressed; ``None`` in a disk whose grains are not compressed. No lock."""
        if not self.needs_compressed_writes:
            return None
        if self._compress is None:
            from .compression import compressor

            self._compress = compressor(self.compression_level)
        return self._compress(buffer)

    def write_compressed(self, offset: int, buffer: memoryview) -> None:
        """Write one grain compressed; in a disk whose grains are not compressed, write it as it is."""
        self.write_from(offset, buffer)

    def write_compressed_clusters(self, offset: int, payloads: list[bytes]) -> None:
        from .compression import framed

        extent = self._only
        if extent is None or not isinstance(extent, SparseExtent) or not extent.compressed:
            raise NotSupported("the grains of this disk are not compressed", where=self.filename)
        if self.read_only:
            raise ReadOnly("cannot write: the image is open read-only", where=self.filename)
        grain = extent.grain
        with self.lock:
            self.check_failure()
            # What the descriptor says about the parent is written before the first grain.
            self.begin_change()
            self._check_unwritten(extent, offset, len(payloads) * grain)
        stored = [framed((offset + at * grain) // SECTOR, payload) for at, payload in enumerate(payloads)]
        engine.write_compressed(self, offset, stored)

    def _check_unwritten(self, extent: SparseExtent, offset: int, length: int) -> None:
        end = min(offset + length, self._size)
        while offset < end:
            done = extent.free_run(offset, end - offset)
            if not done:
                raise NotSupported(f"the grain at {offset:#x} of this stream-optimized disk is written already, and "
                                   "cannot be written again", where=self.filename)  # fmt: skip
            offset += done

    def reserve_compressed(self, lengths: Sequence[int]) -> list[int]:
        allocator = self.allocator(self.extents_of_disk[0])
        assert allocator is not None
        host = allocator.append(sum(lengths), SECTOR)
        hosts = []
        for length in lengths:
            hosts.append(host)
            host += length
        return hosts

    def publish_compressed(self, offset: int, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        allocator = self.allocator(self.extents_of_disk[0])
        assert allocator is not None
        self.guarded(lambda: allocator.link_all(offset, hosts))

    def cancel_compressed(self, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        pass  # the space stays unused: a stream has no holes to fill

    # -- write-back and life ----------------------------------------------------------------------

    def write_back(self) -> None:
        from .writing import write_back

        self.guarded(lambda: write_back(self))

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        raise NotSupported("a VMDK disk cannot change its size", where=self.filename)

    def check(self, control: Control, fix: str = "") -> CheckResult:
        from .check import check_image

        return check_image(self, control, fix)

    def format_info(self) -> dict[str, object]:
        from .describing import describe

        return describe(self)

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if self.refusal and not flags.read_only:
            raise NotSupported(self.refusal, where=self.filename)
        with self.lock:
            if not self.read_only and self.failure is None:
                self._settle()
        return flags, options

    def reopen_commit(self, token: object) -> None:
        super().reopen_commit(token)
        with self.lock:
            self._writing = False
            self._in_place = None

    def _settle(self) -> None:
        """Everything is on disk, and the extents say that they were closed; lock held."""
        from .writing import settle

        self.guarded(lambda: settle(self))
        self._writing = False
        self._in_place = None

    def inactivate(self) -> None:
        super().inactivate()
        with self.lock:
            if not self.read_only and self.failure is None:
                self._settle()

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        from ...graph.node import PERM_ALL, PERM_READ

        if self.force_share:
            return used & PERM_READ, PERM_ALL
        need, share = super().child_permissions(child, used, shared)
        return (need & PERM_READ, share) if child.node.read_only else (need, share)
