"""Regular files and block devices: the leaf under most graphs.

Owns one file descriptor. Opening is :mod:`.descriptor`, creating :mod:`.filecreate`, locks :mod:`.locks`, the length
:mod:`.length`, holes and zeroing :mod:`.filespace`, flushing :mod:`.durability`, other flags :mod:`.reopening`, copies
:mod:`.copying`. All I/O is synchronous in the calling thread, whatever ``aio`` says.
"""

from __future__ import annotations

import errno
import os
import threading
from os import preadv, pwritev
from time import perf_counter_ns

from ..errors import ByreError, InvalidArgument, NotSupported, ReadOnly, from_oserror, printable
from ..graph.node import PERM_ALL, Limits, Node, Stats
from ..io.buffers import zero_fill, zero_view
from ..io.extent import FUA, MAY_UNMAP, NO_FALLBACK
from ..options import Option, OptionSet
from ..typing import TYPE_CHECKING, Final
from . import descriptor, space
from .durability import FlushState, start_write_back
from .filespace import FileSpace
from .length import FileLength, check_preallocation, set_length
from .locks import FileLocks
from .vectors import IOV_MAX, pwritev_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..graph.opening import OpenFlags, OpenRequest
    from ..io.align import AlignedAccess
    from ..io.extent import Extent
    from ..io.extentmap import ExtentMap
    from ..options import OptionValues

__all__ = ["CREATE_OPTIONS", "OPTIONS", "FileNode", "create", "open_node"]

OPTIONS: Final = OptionSet(
    Option("filename", "str", "file name"),
    Option("locking", "enum", "file locking mode (on/off/auto, default: auto)", "auto", ("auto", "on", "off")),
    Option("aio", "enum", "host AIO implementation (threads, native, io_uring); all I/O is synchronous here",
           "threads", ("threads", "native", "io_uring")),
    Option("aio-max-batch", "int", "AIO max batch size; has no effect here", 0),
    Option("drop-cache", "bool", "drop the page cache when another host takes over", True),
    Option("x-check-cache-dropped", "bool", "check that the page cache was dropped", False),
)  # fmt: skip

CREATE_OPTIONS: Final = OptionSet(
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)", False),
    Option("preallocation", "enum", "Preallocation mode (allowed values: off, falloc, full)", "off",
           ("off", "falloc", "full")),
    Option("size", "size", "Virtual disk size", 0),
)  # fmt: skip

DEVICE_DRIVERS: Final = ("host_device", "host_cdrom")
"""Names under which the user may open a character device as well; a regular file they do not open."""

_ZERO_STEP: Final = 1 << 20
_PAGE: Final = 4096


class FileNode(Node):
    """An open regular file or device.

    Guarded by ``_length``: the cached size. Guarded by ``_lock``: the descriptor for unaligned tails. Guarded by
    the graph lock: locks, reopening.

    :ivar identity: equal for two nodes exactly if they are the same file
    :ivar is_device: a device, whose size cannot be changed
    :ivar bulk_size: writes at least this long have their blocks allocated first; set by who streams a whole disk
    :ivar runtime: its options, which reopening starts from
    """

    kind = "protocol"
    driver = "file"

    def __init__(
        self,
        path: str,
        opened: descriptor.Descriptor,
        flags: OpenFlags,
        options: OptionValues | None = None,
        *,
        name: str = "",
    ) -> None:
        super().__init__(name=name, filename=path, read_only=opened.read_only)
        self.open_flags = flags
        self.runtime = options or OPTIONS.parse({}, what="driver 'file'")
        self.is_device = opened.is_device
        self.identity = opened.identity
        self.bulk_size = 1 << 62
        self._where = printable(path)
        self._fd = opened.fd
        self._lock = threading.Lock()
        self._locks = FileLocks(self.runtime.word("locking"), path)
        self._length = FileLength(descriptor.file_size(self._fd, self.is_device, self._where))
        sector = descriptor.sector_size(self._fd) if self.is_device else 0
        self._space = FileSpace(self._fd, self._length, sector)
        self._flushes = FlushState(self.stats, self._where, self._fd)
        #: Of preadv2(2), for reads that must not wait; -1 where there are none.
        self._cached_flags = getattr(os, "RWF_NOWAIT", -1)
        self._tail_fd = -1
        self._direct, self.limits = self._prepare_direct(opened, flags)
        self._space.direct = self._direct

    def _prepare_direct(self, opened: descriptor.Descriptor, flags: OpenFlags) -> tuple[AlignedAccess | None, Limits]:
        if not flags.direct:
            return None, Limits()
        from ..io.align import AlignedAccess

        needs = descriptor.probe_direct(opened, self._where)
        tail = None if opened.is_device else self._write_tail
        access = AlignedAccess(needs.alignment, needs.memory_alignment, self._read_all, self._write_all,
                               end=lambda: self._length.value, write_tail=tail)  # fmt: skip
        return access, Limits(request_alignment=needs.alignment, memory_alignment=needs.memory_alignment)

    # -- size -------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self._length.value

    def refresh_size(self) -> None:
        with self._length.setting():
            self._length.value = descriptor.file_size(self._fd, self.is_device, self._where)

    @property
    def has_zero_init(self) -> bool:
        return not self.is_device

    def allocated_size(self) -> int:
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError as error:
            raise from_oserror(error, "cannot read the allocated size", self._where) from None

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        """Change the length; a device only answers whether it fits.

        :param preallocation: "off", "falloc" (reserved) or "full" (written)
        :param exact: for a device, whose size cannot change: with False it need only be large enough
        :raises InvalidArgument: a device of another size, or preallocation while shrinking
        :raises NotSupported: another preallocation mode
        """
        self._check_writable()
        if self.is_device:
            self._check_device_size(size, exact)
            return
        with self._length.setting():
            before = self._real_end()
            check_preallocation(preallocation, before, size, self._where)
            try:
                set_length(self._fd, before, size, preallocation)
            except (OSError, OverflowError) as error:
                system = error if isinstance(error, OSError) else OSError(errno.EFBIG, "")
                raise from_oserror(system, f"cannot change the size from {before} to {size}", self._where) from None
            finally:
                self._length.value = self._real_end()
                self._space.forget_data()
                self._flushes.changed()

    def _check_device_size(self, size: int, exact: bool) -> None:
        if size > self.size or (exact and size != self.size):
            raise InvalidArgument(f"cannot resize a device: it has {self.size} bytes, not {size}", where=self._where)

    # -- reading ----------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """:raises IOFailure: the system's error, with offset and length"""
        started = perf_counter_ns()
        length = len(buffer)
        try:
            if self._direct is None:
                if preadv(self._fd, (buffer,), offset) != length:
                    self._read_all(offset, buffer)
            else:
                self._direct.read_into(offset, buffer)
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.READ, "read", offset, length, error) from None
        self.stats.done(0, length, started)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        if self._cached_flags < 0 or self._direct is not None:
            return False
        try:
            return preadv(self._fd, (buffer,), offset, self._cached_flags) == len(buffer)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                # A file system in memory cannot be asked, and need not be.
                self._cached_flags = 0 if space.in_memory(self._fd) else -1
            return False

    def file_range(self, offset: int, length: int) -> tuple[int, int] | None:
        if self._direct is not None or offset + length > self._length.value:
            return None
        return self._fd, offset

    def direct_range(self, offset: int, length: int) -> tuple[int, int, Callable[[], None] | None] | None:
        access = self._direct
        if access is None or (offset | length) % access.alignment or access.memory_alignment > _PAGE:
            return None
        return (self._fd, offset, None) if offset + length <= self._length.value else None

    @property
    def buffered(self) -> bool:  # type: ignore[override]
        return self._direct is None

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = sum(map(len, buffers))
        if self._direct is not None or len(buffers) > IOV_MAX:
            super().readv_into(offset, buffers)
            return
        started = perf_counter_ns()
        try:
            if preadv(self._fd, buffers, offset) != length:
                at = offset
                for buffer in buffers:
                    self._read_all(at, buffer)
                    at += len(buffer)
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.READ, "read", offset, length, error) from None
        self.stats.done(0, length, started)

    def _read_all(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; zeroes past the end."""
        length = len(buffer)
        done = 0
        while done < length:
            step = preadv(self._fd, (buffer[done:],), offset + done)
            done += step
            # A direct read may end inside a block only at the end of the file.
            if step == 0 or (self._direct is not None and done % self._direct.alignment):
                zero_fill(buffer[done:])
                return

    # -- writing ----------------------------------------------------------------------------------

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        """:raises NoSpace, IOFailure: the system's error, with offset and length"""
        length = len(buffer)
        end = offset + length
        if length >= self.bulk_size and not self.read_only:
            self._space.allocate(offset, length)
        if flags & FUA or end > self._length.value or self._direct is not None or self.read_only:
            self._write_with_care(offset, (buffer,), length, flags)
            return
        started = perf_counter_ns()
        try:
            done = pwritev(self._fd, (buffer,), offset)
            if done != length:
                self._write_all(offset + done, (buffer[done:],))
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.WRITE, "write", offset, length, error) from None
        stats = self.stats
        stats.done(1, length, started)
        if end > stats.highest_written:
            stats.wrote(end)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self._write_with_care(offset, buffers, sum(map(len, buffers)), flags)

    def _write_with_care(self, offset: int, buffers: Sequence[memoryview], length: int, flags: int) -> None:
        """A write that may grow the file, be durable, be direct, or come in pieces."""
        self._check_writable()
        started = perf_counter_ns()
        try:
            if offset + length > self._length.value and length:
                self._write_growing(offset, buffers, offset + length)
            else:
                self._write_any(offset, buffers)
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.WRITE, "write", offset, length, error) from None
        self.stats.done(Stats.WRITE, length, started)
        self.stats.wrote(offset + length)
        if flags & FUA:
            # Not RWF_DSYNC: a failure to write (no space) must be told from a failure to make durable.
            self.flush()

    def _write_growing(self, offset: int, buffers: Sequence[memoryview], end: int) -> None:
        self._check_growth()
        self._length.begin()
        reached = 0
        try:
            self._write_any(offset, buffers)
            reached = end
        finally:
            self._length.end(reached or self._real_end())

    def _write_any(self, offset: int, buffers: Sequence[memoryview]) -> None:
        if self._direct is None:
            self._write_all(offset, buffers)
        else:
            self._direct.writev_from(offset, buffers)

    def _write_all(self, offset: int, buffers: Sequence[memoryview]) -> None:
        pwritev_all(self._fd, offset, buffers)

    def _write_tail(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """The last, partial block of a file in direct mode goes through the page cache: its length is exact then.

        Direct requests to the same block make the system write it back first.
        """
        with self._lock:
            if self._tail_fd < 0:
                self._tail_fd = descriptor.reopen_descriptor(self._fd, self.filename, self.identity,
                                                             read_only=False).fd  # fmt: skip
        pwritev_all(self._tail_fd, offset, buffers)

    def _real_end(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError:
            return 0

    def _check_growth(self) -> None:
        """:raises OSError: a device cannot grow"""
        if self.is_device:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnly("the file is open read-only", where=self._where)

    def _failed(self, kind: int, verb: str, offset: int, length: int, error: OSError | OverflowError) -> ByreError:
        """Count the failure and word it."""
        self.stats.failed(kind)
        if isinstance(error, OverflowError):
            return InvalidArgument(f"cannot {verb} {length} bytes at {offset:#x}: beyond 2^63", where=self._where)
        return from_oserror(error, f"cannot {verb} {length} bytes at {offset:#x}", self._where)

    def flush(self) -> None:
        """:raises IOFailure: this flush failed, or one before: what was written since the last good one may be lost"""
        if not self.open_flags.no_flush:
            self._flushes.flush()

    def start_write_back(self) -> None:
        """A flush will come: the system may begin to write now. For copies of more than a cache should hold back."""
        if not self.open_flags.no_flush and self._direct is None:
            start_write_back(self._fd)

    # -- zeroes, discards, holes ------------------------------------------------------------------

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """:raises NotSupported: with ``NO_FALLBACK``, and the system cannot zero without writing"""
        self._check_writable()
        if length > 0:
            started = perf_counter_ns()
            try:
                if offset + length > self._length.value:
                    self._check_growth()
                start, end = self._space.zero(offset, length, unmap=bool(flags & MAY_UNMAP),
                                              may_write=not flags & NO_FALLBACK)  # fmt: skip
                if end - start < length and flags & NO_FALLBACK:
                    raise NotSupported("the system cannot zero this range without writing it", where=self._where)
            except (OSError, OverflowError) as error:
                raise self._failed(Stats.ZEROES, "write zeroes to", offset, length, error) from None
            self._fill_zeroes(offset, start - offset)
            self._fill_zeroes(end, offset + length - end)
            self.stats.done(Stats.ZEROES, length, started)
            self.stats.wrote(offset + length)
        if flags & FUA:
            self.flush()

    def _fill_zeroes(self, offset: int, length: int) -> None:
        for done in range(0, length, _ZERO_STEP):
            self.write_from(offset + done, zero_view(min(_ZERO_STEP, length - done)))

    def discard(self, offset: int, length: int) -> None:
        """Give the space back where ``discard=unmap`` was asked for; else nothing happens."""
        if not self.open_flags.unmap:
            return
        self._check_writable()
        started = perf_counter_ns()
        try:
            self._space.discard(offset, length)
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.DISCARD, "discard", offset, length, error) from None
        self.stats.done(Stats.DISCARD, length, started)

    def block_status(self, offset: int, length: int) -> Extent:
        """DATA, or ZERO for a hole (host = offset: the same place in the file) and past the end (no host)."""
        try:
            return self._space.status(offset, length)
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.READ, "look for data in", offset, length, error) from None

    def extents(self, offset: int, length: int) -> ExtentMap:
        from ..io.extentmap import ExtentMap

        try:
            return ExtentMap.from_extents(self._space.extents(offset, length))
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.READ, "look for data in", offset, length, error) from None

    # -- copying ----------------------------------------------------------------------------------

    def copy_range(self, source_offset: int, target: FileNode, target_offset: int, length: int) -> int:
        """Let the system copy bytes to another file; it may share them or stop early.

        :returns: bytes copied, 0 at the end of this file
        :raises NotSupported: the system cannot copy between these two
        """
        from .copying import copy_range

        return copy_range(self, source_offset, target, target_offset, length)

    # -- permissions and life ---------------------------------------------------------------------

    def set_permissions(self, used: int, shared: int) -> None:
        if not self.closed:
            unshared = 0 if self.open_flags.force_share else PERM_ALL & ~shared
            self._locks.change(self._fd, used & PERM_ALL, unshared)

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        """:raises InvalidArgument: another file name or locking mode"""
        from .reopening import prepare

        return prepare(self, flags, options)

    def reopen_commit(self, token: object) -> None:
        from .reopening import commit

        commit(self, token)

    def reopen_abort(self, token: object) -> None:
        from .reopening import abort

        abort(token)

    def close(self) -> None:
        """:raises IOFailure: the system reports at closing that data was lost (network file systems do)"""
        self.closed = True
        fd, self._fd = self._fd, -1
        self._flushes.move(-1)
        tail, self._tail_fd = self._tail_fd, -1
        if tail >= 0:
            descriptor.close_quietly(tail)
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                raise from_oserror(error, "cannot close", self._where) from None


def open_node(request: OpenRequest) -> FileNode:
    """The node for ``filename``.

    :raises ByreError: see :func:`.descriptor.open_descriptor`
    """
    path = request.options.text("filename")
    driver = request.row.name
    if not path:
        raise InvalidArgument(f"driver {driver!r} needs a filename")
    flags = request.flags
    opened = descriptor.open_descriptor(path, read_only=flags.read_only, direct=flags.direct,
                                        auto_read_only=flags.auto_read_only, implicit=request.implicit,
                                        character=driver in DEVICE_DRIVERS)  # fmt: skip
    try:
        if driver in DEVICE_DRIVERS and not opened.is_device:
            raise InvalidArgument(f"driver {driver!r} needs a block or character device", where=printable(path),
                                  hint="driver 'file' opens regular files")  # fmt: skip
        node = FileNode(path, opened, flags, request.options, name=request.name)
    except BaseException:
        os.close(opened.fd)
        raise
    node.driver = driver
    return node


def create(path: str, options: OptionValues) -> None:
    """Create ``path``, or empty it if nobody uses it; see :func:`.filecreate.create_file`."""
    from .filecreate import create_file

    create_file(path, options)
