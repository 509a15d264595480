"""Qcow2Node: a qcow2 image as a node; joins mapping, refcounts and compression to the format contract.

Owns the header in memory and the order in which tables reach the disk. Opening is in :mod:`.opening`,
resizing in :mod:`.resizing`, checking in :mod:`.check`.
"""

from __future__ import annotations

import threading
from array import array
from functools import partial

from ...errors import ByreError, Corrupt, ImageError
from ...io import engine
from ...io.extent import FUA, MAY_UNMAP, UNALLOCATED, Extent
from ...io.extent import ZERO as KIND_ZERO
from ...io.tables import decode_words
from ...typing import TYPE_CHECKING, Final, cast
from ..abilities import CheckResult
from ..base import FormatNode, Placement
from . import entries, layout
from .amend_ability import WithAmending
from .bitmap_ability import WithBitmaps
from .mapping import Mapping
from .refcounts import Refcounts
from .snapshot_ability import WithSnapshots
from .unmapping import unmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ...crypto.luks import Volume
    from ...crypto.luks_slots import SlotChange
    from ...graph.child import Child
    from ...graph.node import Node
    from ...graph.opening import OpenFlags
    from ...io.extentmap import ExtentMap
    from ...jobs.job import Control
    from ...options import OptionValues
    from ..encryption import NodeArea
    from .overlap import Guard

__all__ = ["Qcow2Node"]

_PENDING_LIMIT: Final = 4096
"""Freed runs of clusters that may wait for the next write-back before one is forced."""


class Qcow2Node(WithAmending, WithBitmaps, WithSnapshots, FormatNode):
    """An open qcow2 image, versions 2 and 3.

    Guarded by ``lock``: header, tables, allocator.

    :ivar header: the header as it is on disk
    :ivar extensions: header extensions in their order, unknown ones to the byte
    """

    driver = "qcow2"

    def __init__(self, file: Node, header: layout.Header, extensions: tuple[layout.Extension, ...],
                 backing_name: str, options: OptionValues, flags: OpenFlags, *, name: str = "") -> None:  # fmt: skip
        super().__init__(name=name, filename=file.filename, read_only=flags.read_only)
        self.file = file
        self.header = header
        self.extensions = extensions
        self.backing_name = backing_name
        self.runtime = options
        self.open_flags = flags
        self.force_share = flags.force_share
        self.detect_zeroes = flags.detect_zeroes
        self.pass_discard = flags.unmap
        self.cluster_size = header.cluster_size
        self.zero_unit = 1 << header.subcluster_bits
        self.encrypted = bool(header.crypt_method)
        #: LUKS header and where it lies; ``None`` without one.
        self.volume: Volume | None = None
        self.area: NodeArea | None = None
        self._size = header.disk_size
        self.mapping: Mapping = Mapping(file, header, array("Q"), self.filename, self._relieve, self._free)
        self.table_span = 1 << self.mapping.span_bits
        self.refcounts: Refcounts | None = None
        self.report = file.debug_event if file.takes_events else None
        self._writing = False
        #: Held by who writes back with ``lock`` let go in between; taken before ``lock``.
        self.writing_back = threading.Lock()
        #: Reference counts may wait; the dirty bit on disk is this node's own.
        self.lazy_refcounts = self.marked_dirty = False
        self.guard: Guard | None = None
        self._dropping = "other"
        self.init_snapshots()
        self._decompress: Callable[[memoryview, memoryview], None] | None = None
        self._compress: Callable[[memoryview], bytes | None] | None = None
        self.compression_level: int | None = None

    # -- what the header says ---------------------------------------------------------------------

    @property
    def data_file(self) -> Node | None:
        """The external data file's node, if there is one and it is open."""
        child = self.children.get("data-file")
        return child.node if child else None

    @property
    def compression_name(self) -> str:
        return layout.COMPRESSION_NAMES[self.header.compression_type]

    @property
    def dirty(self) -> bool:
        """Not shut down cleanly: the next writable open rebuilds the reference counts."""
        return bool(self.header.incompatible_features & layout.INCOMPATIBLE_DIRTY)

    @property
    def has_zero_init(self) -> bool:
        # What was allocated but not written yet decrypts to anything.
        return not self.encrypted or not any(self.mapping.l1)

    @property
    def has_zero_clusters(self) -> bool:
        """A range can read as zeroes whatever backing file there is, or will be."""
        return self.header.version >= 3

    def load_tables(self) -> None:
        """Read the L1 table, and the refcount table where the image may be written."""
        header = self.header
        self._check_present("L1 table", header.l1_table_offset, header.l1_size)
        data = bytearray(header.l1_size * 8)
        self.file.read_into(header.l1_table_offset, memoryview(data))
        self.mapping = Mapping(self.file, header, decode_words(data), self.filename, self._relieve, self._free)
        self.refcounts = None
        self.loaded_snapshot = None
        if not self.read_only:
            self.load_refcounts()
        elif self.runtime.given:
            self.tune()

    def _check_present(self, name: str, offset: int, size: int) -> None:
        """:raises ImageError: a table lies past the end of the file, where it would read as if nothing were mapped"""
        if size and offset >= self.file.size and not self.open_flags.check:
            raise ImageError(f"the {name} at {offset:#x} lies past the end of the file ({self.file.size:#x})",
                             where=self.filename, hint="the file seems to be cut short")  # fmt: skip

    def load_refcounts(self) -> None:
        header = self.header
        self._check_present("refcount table", header.refcount_table_offset, header.refcount_table_clusters)
        self.refcounts = Refcounts(
            self.file, header.cluster_bits, header.refcount_order, header.refcount_table_offset,
            header.refcount_table_clusters, self._relieve, self._publish_refcount_table, self._metadata_at,
            self.filename,
        )  # fmt: skip
        self.refcounts.on_failure = self.fail_stop
        self.mapping.refcounts = self.refcounts
        self.tune()

    def _metadata_at(self, first: int, count: int) -> str:
        """What known metadata lies in ``count`` clusters from ``first``, "" if none: it must not be given away."""
        return self.guard.at(first, count) if self.guard is not None else ""

    def tune(self) -> None:
        """Take over the run-time options; lock held."""
        from .runtime import tune

        tune(self)

    def invalidate(self) -> None:
        """Write back and forget every cached table, then read header and tables again from the file."""
        from .opening import reread

        with self.lock:
            if not self.read_only:
                self._guarded(self.settle)
            reread(self)

    # -- lookup -----------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> list[Extent]:
        try:
            return self.mapping.lookup(offset, length)
        except Corrupt as error:
            self._mark_corrupt(error)
            raise

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        try:
            return self.mapping.lookup_all(offset, length)
        except Corrupt as error:
            self._mark_corrupt(error)
            raise

    def cached_host(self, offset: int, length: int) -> int:
        return self.mapping.cached_host(offset, length)

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        bits, size = self.header.cluster_bits, self.cluster_size
        host, stored = entries.compressed_host(extent.host, bits)
        data = memoryview(bytearray(stored))
        self.file.read_into(host, data)
        if self._decompress is None:
            from . import compression

            self._decompress = partial(compression.decompress, self.header.compression_type)
        skip = extent.offset & (size - 1)
        try:
            if len(buffer) == size:
                self._decompress(data, buffer)
                return
            cluster = memoryview(bytearray(size))
            self._decompress(data, cluster)
        except ImageError as error:
            error.message = (
                f"cannot read the compressed cluster at guest offset {extent.offset - skip:#x}: {error.message}"
            )
            error.where = error.where or self.filename
            raise
        buffer[:] = cluster[skip : skip + len(buffer)]

    # -- reserve, publish, cancel -----------------------------------------------------------------

    def _before_change(self) -> None:
        """First of all, feature bits that promise what is no longer kept are cleared; space is not hoarded."""
        self.mapping.has_backing = "backing" in self.children
        if not self._writing:
            self._guarded(self._start_writing)
        if self.refcounts is not None and len(self.refcounts.ready) > _PENDING_LIMIT:
            self._guarded(self.write_back)

    def _start_writing(self) -> None:
        """Bitmaps get ready to follow; the autoclear bits this program does not keep up are cleared."""
        bitmaps = self.begin_bitmaps()
        header = self.header
        kept = header.autoclear_features & (layout.AUTOCLEAR_RAW_DATA | bitmaps)
        if header.version >= 3 and kept != header.autoclear_features:
            self.header = header._replace(autoclear_features=kept)
            self.file.write_from(88, memoryview(kept.to_bytes(8, "big")))
            self.file.flush()
        self._writing = True

    def in_place(self, offset: int, length: int) -> int:
        if not self._writing or self.cipher is not None or self.report is not None:
            return -1
        return self.mapping.in_place(offset, length)

    def reserve(self, offset: int, length: int) -> list[Placement]:
        self._before_change()
        self._dropping = "other"
        try:
            return self.mapping.reserve(offset, length)
        except Corrupt as error:
            self._mark_corrupt(error)
            raise

    def _mark_corrupt(self, error: Corrupt) -> None:
        """Metadata contradicts itself: nothing is written any more, and version 3 says so in the header if it may."""
        if self.failure is not None or self.read_only:
            return
        header = self.header
        if header.version >= 3:
            self.header = header._replace(
                incompatible_features=header.incompatible_features | layout.INCOMPATIBLE_CORRUPT
            )
            try:
                self.file.write_from(72, memoryview(self.header.incompatible_features.to_bytes(8, "big")))
                self.file.flush()
            except ByreError:
                pass  # the image is out of service either way, and the first error is the one to tell
        self.fail_stop(error)

    def publish(self, placements: Sequence[Placement]) -> None:
        self._guarded(lambda: self.mapping.publish(list(placements)))

    def cancel(self, placements: Sequence[Placement]) -> None:
        self.mapping.cancel(list(placements))

    def _guarded(self, action: Callable[[], None]) -> None:
        """A metadata change that fails half way takes the node out of service."""
        try:
            action()
        except BaseException as error:
            if isinstance(error, Corrupt):
                self._mark_corrupt(error)
            self.fail_stop(error)
            raise

    # -- compressed clusters ----------------------------------------------------------------------

    def compress(self, buffer: memoryview) -> bytes | None:
        """One cluster compressed; ``None`` if that does not make it smaller. No lock; a short cluster is padded."""
        if self._compress is None:
            from . import compression

            self._compress = compression.compressor(self.header.compression_type, self.compression_level)
        if len(buffer) < self.cluster_size:
            padded = bytearray(self.cluster_size)
            padded[: len(buffer)] = buffer
            buffer = memoryview(padded)
        return self._compress(buffer)

    def write_compressed(self, offset: int, buffer: memoryview) -> None:
        from ...errors import InvalidArgument

        self._check_compressible()
        last = min(self.cluster_size, self._size - offset)
        if offset % self.cluster_size or len(buffer) not in (self.cluster_size, last):
            raise InvalidArgument(f"a compressed write covers exactly one cluster of {self.cluster_size} bytes, "
                                  f"not {len(buffer)} bytes at {offset:#x}", where=self.filename)  # fmt: skip
        payload = self.compress(buffer)
        if payload is None:
            engine.write(self, offset, buffer)
        else:
            engine.write_compressed(self, offset, [payload])

    def _check_compressible(self) -> None:
        from ...errors import NotSupported

        if self.encrypted:
            raise NotSupported("an encrypted image cannot hold compressed clusters", where=self.filename)
        if self.header.has_data_file:
            raise NotSupported(
                "an image with an external data file cannot hold compressed clusters", where=self.filename
            )

    def write_compressed_clusters(self, offset: int, payloads: list[bytes]) -> None:
        from ...errors import InvalidArgument

        self._check_compressible()
        if offset % self.cluster_size or not all(0 < len(payload) < self.cluster_size for payload in payloads):
            raise InvalidArgument(f"compressed clusters begin at multiples of {self.cluster_size} bytes and are "
                                  "smaller than that", where=self.filename)  # fmt: skip
        engine.write_compressed(self, offset, payloads)

    def prepare_compressed(self, offset: int, end: int) -> None:
        self._before_change()
        self._dropping = "other"
        try:
            self.mapping.prepare_tables(offset, end - offset)
        except Corrupt as error:
            self._mark_corrupt(error)
            raise

    def reserve_compressed(self, lengths: Sequence[int]) -> list[int]:
        assert self.refcounts is not None
        hosts: list[int] = []
        try:
            for length in lengths:
                hosts += self.refcounts.allocate_packed([length])
        except BaseException:
            self.cancel_compressed(hosts, lengths[: len(hosts)])
            raise
        return hosts

    def publish_compressed(self, offset: int, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        self._guarded(lambda: self.mapping.publish_compressed(offset, list(hosts), list(lengths)))

    def cancel_compressed(self, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        assert self.refcounts is not None
        for host, length in zip(hosts, lengths, strict=True):
            self.refcounts.release_packed(host, length)

    # -- unmap and free ---------------------------------------------------------------------------

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        if kind == KIND_ZERO and self.header.version < 3 and self.backing_name:
            return 0  # also where the backing file is not open now: it would show through another time
        self._before_change()
        self._dropping = "request"
        raw_data = self.header.has_data_file and self.header.raw_data_file
        if raw_data and self.data_file is not None:
            # A raw data file must read the same without the tables.
            length = min(length, self.table_span - offset % self.table_span)
            self.data_file.write_zeroes(offset, min(length, self._size - offset), 0 if keep else MAY_UNMAP)
            kind = KIND_ZERO
        try:
            done = unmap(self.mapping, offset, length, kind, keep)
        except Corrupt as error:
            self._mark_corrupt(error)
            raise
        if self.mapping.kept:
            from .writeback import punch_kept

            self._guarded(lambda: punch_kept(self))
        return done

    def _free(self, first: int, count: int) -> None:
        """Nothing in the tables refers to these clusters: lowered once that is on disk and no request uses them."""
        refcounts = self.refcounts
        assert refcounts is not None
        punch = self._dropping
        self.inflight.when_clear(lambda: refcounts.ready.append((first, count, punch)))

    # -- write-back: the order of RELIABILITY 2.3 -------------------------------------------------

    def write_back(self) -> None:
        from .writeback import write_back

        self._guarded(lambda: write_back(self))

    def write_back_apart(self) -> bool:
        from .writeback import write_back_apart

        return write_back_apart(self)

    def settle(self) -> None:
        """Write everything back, also reference counts that may wait; lock held."""
        from .writeback import settle

        settle(self)

    def _punches(self, reason: str) -> bool:
        """Whether freed space is given back to the file system ("pass-discard-request", "-snapshot", "-other")."""
        name = f"pass-discard-{reason}"
        if name in self.runtime:
            return self.runtime.flag(name)
        return reason == "snapshot" or (reason == "request" and self.pass_discard)

    def _relieve(self) -> None:
        """A cache is full of changed tables."""
        from .writeback import write_back

        self._guarded(lambda: write_back(self, counts=True))

    def _publish_refcount_table(self, offset: int, clusters: int) -> None:
        """Header bytes 48 to 59, in one sector, durable."""
        self.header = self.header._replace(refcount_table_offset=offset, refcount_table_clusters=clusters)
        self.file.write_from(48, memoryview(offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")), FUA)
        self.file.flush()

    # -- abilities --------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        from .resizing import resize

        resize(self, size, preallocation)

    def check(self, control: Control, fix: str = "") -> CheckResult:
        from .check import check_image

        return check_image(self, control, fix)

    def has_holes(self) -> bool:
        from .sparseness import has_holes

        return not self.encrypted and has_holes(self)  # an encrypted hole does not read as zeroes

    def format_info(self) -> dict[str, object]:
        from .opening import describe

        return describe(self)

    def change_key_slots(self, change: SlotChange, secret: bytes, *, limit: int = 100_000_000) -> None:
        from .encryption import change_key_slots

        change_key_slots(self, change, secret, limit=limit)

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        from .reopening import prepare

        prepare(self, flags, options)
        return flags, options

    def reopen_commit(self, token: object) -> None:
        from .reopening import commit

        flags, options = cast("tuple[OpenFlags, OptionValues]", token)
        commit(self, flags, options)

    def reopen_finish(self) -> None:
        if self.header.incompatible_features & layout.INCOMPATIBLE_DIRTY and not self.read_only:
            from .check import repair_dirty

            repair_dirty(self)

    def inactivate(self) -> None:
        super().inactivate()
        with self.lock:
            if not self.read_only and self.failure is None:
                self.store_bitmaps()
                self._guarded(self.settle)

    def holders(self) -> Iterable[object]:
        found = [self.mapping, self.mapping.l2]
        if self.refcounts is not None:
            found += [self.refcounts, self.refcounts.blocks]
        return found if self.area is None else [*found, self.area]

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        from ...graph.node import PERM_ALL, PERM_READ

        if self.force_share:
            return used & PERM_READ, PERM_ALL
        return super().child_permissions(child, used, shared)

    def unallocate(self, offset: int, length: int) -> int:
        """Drop the mapping of whole clusters altogether (shrinking); lock held; bytes done."""
        self._before_change()
        self._dropping = "request"
        return unmap(self.mapping, offset, length, UNALLOCATED, False, full=True)
