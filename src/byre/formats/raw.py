"""raw: the bytes of the file as they are, or a slice of them (``offset``, ``size``).

No metadata, so requests go straight to the file. A raw image that was probed, not chosen, refuses
writes that would make its first or last bytes look like another format.
"""

from __future__ import annotations

import threading
from time import perf_counter_ns

from ..catalog import PROBE_SIZE, TAIL_SIZE, probe
from ..errors import AccessDenied, ImageError, InvalidArgument, NoSpace, ReadOnly
from ..graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, Limits, Node, Stats
from ..graph.opening import OpenFlags
from ..io.buffers import is_zero
from ..io.extent import DATA, MAY_UNMAP, Extent
from ..options import Option, OptionSet
from ..typing import TYPE_CHECKING, cast
from ..units import SECTOR, align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..graph.child import Child
    from ..graph.creating import CreateRequest
    from ..graph.opening import OpenRequest
    from ..io.extentmap import ExtentMap
    from ..options import OptionValues

__all__ = ["CREATE_OPTIONS", "OPTIONS", "RawNode", "create", "open_node"]

CHILDREN = ("file",)
NAME_OPTIONS = ("offset", "size")

OPTIONS = OptionSet(
    Option("offset", "size", "where the image begins in the file", 0),
    Option("size", "size", "length of the image"),
)

CREATE_OPTIONS = OptionSet(
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("preallocation", "enum", "Preallocation mode (allowed values: off, falloc, full)", "off",
           ("off", "falloc", "full")),
    Option("size", "size", "Virtual disk size"),
)  # fmt: skip


def open_node(request: OpenRequest) -> RawNode:
    file = request.open_child("file")
    node = RawNode(
        file,
        name=request.name,
        read_only=request.flags.read_only or file.read_only,
        offset=request.options.number("offset"),
        size=request.options.optional_number("size"),
    )
    node.detect_zeroes = request.flags.detect_zeroes
    node.pass_discard = request.flags.unmap
    node.force_share = request.flags.force_share
    node.open_flags = request.flags
    node.runtime = request.options
    child = request.opener.graph.attach(node, "file", file, "filtered")
    node.sources = (child,)
    return node


class RawNode(Node):
    """A file, or a slice of one, as a disk. Guarded by: nothing; it has no state that requests change.

    :ivar base: where the disk begins in the file, bytes
    :ivar probed: nobody said that it is raw, so its first and last bytes are protected
    """

    kind = "format"

    def __init__(self, file: Node, *, name: str = "", read_only: bool = False, offset: int = 0,
                 size: int | None = None) -> None:  # fmt: skip
        super().__init__(name=name, filename=file.filename, read_only=read_only)
        self._check_slice(file, offset, size)
        self.lock = threading.Lock()  # for bitmaps/tracking.py
        self.base = offset
        self._slice = size
        self._file = file
        self._report = file.debug_event if file.takes_events else None
        self.sources: tuple[Child, ...] = ()
        self.probed = False
        #: Held from the look at a write to what is probed until it is done: two halves of a signature look harmless.
        self._edges = threading.Lock()
        self.detect_zeroes = "off"
        self.pass_discard = True
        self.force_share = False
        self.open_flags = OpenFlags()
        self.runtime: OptionValues | None = None
        self.limits = Limits(request_alignment=file.limits.request_alignment)

    @staticmethod
    def _check_slice(file: Node, offset: int, size: int | None) -> None:
        if offset > file.size or (size is not None and offset + size > file.size):
            length = "the rest" if size is None else size
            raise InvalidArgument(f"the slice at {offset:#x} of {length} bytes does not lie within the file of "
                                  f"{file.size} bytes", where=file.filename)  # fmt: skip

    @property
    def size(self) -> int:
        if self._slice is not None:
            return self._slice
        # A disk consists of sectors; what the last one lacks in the file reads as zeroes.
        return align_up(self._file.size - self.base, SECTOR)

    # -- requests ---------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        started = perf_counter_ns()
        inside = self.size - offset
        if len(buffer) > inside and self._slice is not None:
            super_view = buffer[max(inside, 0) :]
            super_view[:] = bytes(len(super_view))
            buffer = buffer[: max(inside, 0)]
        if self._report is not None:
            self._report("read_aio")
        try:
            self._file.read_into(self.base + offset, buffer)
        except BaseException:
            self.stats.failed(Stats.READ)
            raise
        self.stats.done(Stats.READ, len(buffer), started)

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        if self._report is not None:
            self._report("read_aio")
        started = perf_counter_ns()
        self._file.readv_into(self.base + offset, buffers)
        self.stats.done(Stats.READ, sum(map(len, buffers)), started)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        if self._report is not None or (self._slice is not None and offset + len(buffer) > self._slice):
            return False
        return self._file.read_cached(self.base + offset, buffer)

    def direct_range(self, offset: int, length: int) -> tuple[int, int, Callable[[], None] | None] | None:
        if self._report is not None or (self._slice is not None and offset + length > self._slice):
            return None
        return self._file.direct_range(self.base + offset, length)

    def file_range(self, offset: int, length: int) -> tuple[int, int] | None:
        if self._report is not None or (self._slice is not None and offset + length > self._slice):
            return None
        return self._file.file_range(self.base + offset, length)

    @property
    def buffered(self) -> bool:  # type: ignore[override]
        return self._file.buffered

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self._check_write(offset, len(buffer))
        if self.probed and self._touches_probe(offset, len(buffer)):
            with self._edges:
                self._check_probe(offset, buffer)
                self._write(offset, buffer, flags)
        else:
            self._write(offset, buffer, flags)

    def _write(self, offset: int, buffer: memoryview, flags: int) -> None:
        started = perf_counter_ns()
        if self._report is not None:
            self._report("write_aio")
        try:
            if self.detect_zeroes != "off" and is_zero(buffer):
                unmap = MAY_UNMAP if self.detect_zeroes == "unmap" else 0
                self._file.write_zeroes(self.base + offset, len(buffer), flags | unmap)
            else:
                self._file.write_from(self.base + offset, buffer, flags)
        except BaseException:
            self.stats.failed(Stats.WRITE)
            raise
        finally:
            if self.tracker is not None:
                self.tracker.mark(offset, len(buffer))
        self.stats.done(Stats.WRITE, len(buffer), started)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        length = sum(map(len, buffers))
        if self.detect_zeroes != "off":
            super().writev_from(offset, buffers, flags)
            return
        if self.probed and self._touches_probe(offset, length):
            # Together: buffer by buffer, what is in between could look like another format, or not.
            self.write_from(offset, memoryview(b"".join(buffers)), flags)
            return
        self._check_write(offset, length)
        try:
            self._file.writev_from(self.base + offset, buffers, flags)
        finally:
            if self.tracker is not None:
                self.tracker.mark(offset, length)

    def _touches_probe(self, offset: int, length: int) -> bool:
        """Whether a request reaches into what probing looks at: the first 2 KiB, the last 512 bytes."""
        return offset < PROBE_SIZE or self.base + offset + length > self._file.size - TAIL_SIZE

    def _check_probe(self, offset: int, buffer: memoryview) -> None:
        """A guest may not turn a probed raw image into another format by writing to its start or its end."""
        end = max(self._file.size - self.base, offset + len(buffer))
        head = self._after_write(0, min(PROBE_SIZE, end), offset, buffer)
        tail = self._after_write(end - TAIL_SIZE, TAIL_SIZE, offset, buffer) if end >= TAIL_SIZE else b""
        self._check_format(head, tail)

    def _after_write(self, start: int, length: int, offset: int, buffer: memoryview) -> bytes:
        """What ``[start, start + length)`` holds once ``buffer`` is written at ``offset``."""
        data = bytearray(length)
        self._file.read_into(self.base + start, memoryview(data))
        first, last = max(start, offset), min(start + length, offset + len(buffer))
        if first < last:
            data[first - start : last - start] = buffer[first - offset : last - offset]
        return bytes(data)

    def _check_format(self, head: bytes, tail: bytes) -> None:
        found = probe(head, tail)
        if found.name != "raw":
            raise AccessDenied(
                f"this write would make the image, which was probed as raw, look like {found.name}",
                where=self.filename,
                hint='say that it is raw (-f raw, or driver="raw") if the write is meant',
            )

    def _check_probe_zeroes(self, offset: int, length: int) -> None:
        """Zeroes between bytes that are there can complete a signature as well."""
        if offset < PROBE_SIZE:
            self._check_probe(offset, memoryview(bytes(min(length, PROBE_SIZE - offset))))
        skip = max(length - TAIL_SIZE, 0)
        self._check_probe(offset + skip, memoryview(bytes(length - skip)))

    def _check_write(self, offset: int, length: int) -> None:
        if self.read_only:
            raise ReadOnly("cannot write: the image is open read-only", where=self.filename)
        if self._slice is not None and offset + length > self._slice:
            raise NoSpace(f"cannot write {length} bytes at {offset:#x}: the slice ends at {self._slice:#x}",
                          where=self.filename)  # fmt: skip

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self._check_write(offset, length)
        if self.probed and self._touches_probe(offset, length):
            with self._edges:
                self._check_probe_zeroes(offset, length)
                self._write_zeroes(offset, length, flags)
        else:
            self._write_zeroes(offset, length, flags)

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        started = perf_counter_ns()
        try:
            self._file.write_zeroes(self.base + offset, length, flags)
        finally:
            if self.tracker is not None:
                self.tracker.mark(offset, length)
        self.stats.done(Stats.ZEROES, length, started)

    def discard(self, offset: int, length: int) -> None:
        if not self.pass_discard:
            return
        self._check_write(offset, 0)
        length = min(length, self.size - offset)
        if self.probed and self._touches_probe(offset, length):
            with self._edges:
                self._check_probe_zeroes(offset, length)
                self._discard(offset, length)
        else:
            self._discard(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        started = perf_counter_ns()
        try:
            self._file.discard(self.base + offset, length)
        finally:
            if self.tracker is not None:
                self.tracker.mark(offset, length)
        self.stats.done(Stats.DISCARD, length, started)

    def flush(self) -> None:
        self._file.flush()

    # -- looking ----------------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> Extent:
        length = min(length, max(self.size - offset, 0)) or length
        found = self._file.block_status(self.base + offset, length)
        kind = found.kind if found.kind <= 1 else DATA
        return Extent(offset, min(found.length, length), kind, self.base + offset)

    def extents(self, offset: int, length: int) -> ExtentMap:
        found = self._file.extents(self.base + offset, length)
        found.host = found.offset.copy()
        found.offset = found.offset - self.base
        found.kind = found.kind.copy()
        found.kind[found.kind > 1] = DATA
        return found

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        if self._slice is not None:
            raise ImageError("a slice of a file cannot be resized", where=self.filename)
        if self.probed and TAIL_SIZE <= size < self._file.size - self.base:
            # What lay in the middle of the disk comes to lie at its end.
            nothing = memoryview(b"")
            head = self._after_write(0, min(PROBE_SIZE, size), 0, nothing)
            self._check_format(head, self._after_write(size - TAIL_SIZE, TAIL_SIZE, 0, nothing))
        tracker = self.tracker
        if tracker is not None and size > self.size:
            tracker.resize(size)
        try:
            self._file.resize(self.base + size, preallocation=preallocation, exact=exact)
        finally:
            if tracker is not None:
                tracker.resize(self.size)

    def refresh_size(self) -> None:
        self._file.refresh_size()

    @property
    def has_zero_init(self) -> bool:
        return self._file.has_zero_init

    # -- permissions and reopening ----------------------------------------------------------------

    def child_moved(self, child: Child, before: Node) -> None:
        self._file = child.node

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if self.force_share:
            return used & PERM_READ, PERM_ALL
        if self._slice is not None or self.base:
            return used & ~PERM_RESIZE | (PERM_RESIZE if used & PERM_RESIZE else 0), shared
        return used, shared

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        offset, size = options.number("offset"), options.optional_number("size")
        self._check_slice(self._file, offset, size)
        return flags, options

    def reopen_commit(self, token: object) -> None:
        flags, options = cast("tuple[OpenFlags, OptionValues]", token)
        self.open_flags, self.runtime = flags, options
        self.base, self._slice = options.number("offset"), options.optional_number("size")
        self.read_only = flags.read_only
        self.detect_zeroes = flags.detect_zeroes
        self.pass_discard = flags.unmap


def create(request: CreateRequest) -> None:
    """A raw image is its file: make it as long as asked."""
    options = request.options
    size = options.number("size")
    if size >= 1 << 63:
        raise InvalidArgument(f"size is {size}, allowed are {2**63 - 512} bytes", where=request.filename)
    request.file.resize(size, preallocation=options.word("preallocation"), exact=False)
