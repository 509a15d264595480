"""Regular files and block devices: the leaf under most graphs.

Owns one file descriptor, its cached length, the image locks on it and what was learned about it (what
the file system cannot do, where the last data was found). Opening is :mod:`.descriptor`, creating
:mod:`.filecreate`, locks :mod:`.locks`, fallocate and holes :mod:`.space`. All I/O is synchronous in the
calling thread, whatever ``aio`` says.
"""

from __future__ import annotations

import errno
import os
import threading
from os import preadv, pwritev
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError, InvalidArgument, IOFailure, NotSupported, ReadOnly, from_oserror, printable
from ..graph.node import PERM_ALL, Limits, Node, Stats
from ..io.buffers import zero_fill, zero_view
from ..io.extent import DATA, FUA, MAY_UNMAP, NO_FALLBACK, ZERO, Extent
from ..options import Option, OptionSet
from ..units import align_down, align_up
from . import descriptor, space
from .length import FileLength
from .locks import FileLocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..graph.opening import OpenFlags, OpenRequest
    from ..io.align import AlignedAccess
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

_IOV_MAX: Final = 1024
_RWF_DSYNC: Final = getattr(os, "RWF_DSYNC", 0)
_NO_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM)
_TRUNCATED: Final = "cannot change the size from {} to {}"


class _Reopen(NamedTuple):
    """What ``reopen_prepare`` made."""

    opened: descriptor.Descriptor
    flags: OpenFlags
    direct: AlignedAccess | None
    limits: Limits


class FileNode(Node):
    """An open regular file or block device.

    Guarded by ``_length``: the cached size. Guarded by ``_lock``: the flush state and the descriptor for
    unaligned tails. Guarded by the graph lock: locks, reopening. What was learned about the file (``_cannot``,
    ``_data``) is replaced whole and may be lost, never wrong.

    :ivar identity: equal for two nodes exactly if they are the same file
    :ivar is_device: a block device
    """

    kind = "protocol"
    driver = "file"

    def __init__(
        self, path: str, opened: descriptor.Descriptor, flags: OpenFlags, *, name: str = "", locking: str = "auto"
    ) -> None:
        super().__init__(name=name, filename=path, read_only=opened.read_only)
        self.open_flags = flags
        self.is_device = opened.is_device
        self.identity = opened.identity
        self._where = printable(path)
        self._fd = opened.fd
        self._lock = threading.Lock()
        self._locks = FileLocks(locking, path)
        self._length = FileLength(descriptor.file_size(self._fd, self.is_device, self._where))
        self._data = (0, 0)  # the last data run found; bytes in it are data or were a moment ago
        self._cannot: frozenset[object] = frozenset()
        self._other_changes = 0  # resizes and copies, which statistics do not count
        self._flushed = 0
        self._flush_failure = ""
        self._tail_fd = -1
        self._dsync = _RWF_DSYNC
        self._direct, self.limits = self._prepare_direct(opened, flags)

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
        """
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
            try:
                before = os.fstat(self._fd).st_size
                check_preallocation(preallocation, before, size, self._where)
                set_length(self._fd, before, size, preallocation)
            except OSError as error:
                raise from_oserror(error, _TRUNCATED.format(before, size), self._where) from None
            finally:
                self._length.value = os.fstat(self._fd).st_size
                self._data = (0, 0)
                self._changed_otherwise()

    def _check_device_size(self, size: int, exact: bool) -> None:
        have = self.size
        if size > have:
            raise InvalidArgument(f"cannot grow a device: it has {have} bytes, {size} are needed", where=self._where)
        if exact and size != have:
            raise InvalidArgument(f"cannot resize a device: it has {have} bytes", where=self._where)

    def _changed_otherwise(self) -> None:
        with self._lock:
            self._other_changes += 1

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

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = sum(map(len, buffers))
        if self._direct is not None or len(buffers) > _IOV_MAX:
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
        if flags & FUA or end > self._length.value or self._direct is not None or self.read_only:
            self._write_with_care(offset, (buffer,), length, flags)
            return
        started = perf_counter_ns()
        try:
            done = pwritev(self._fd, (buffer,), offset)
            if done != length:
                self._write_all(offset + done, (buffer[done:],), 0)
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
        if length == 0:
            if flags & FUA:
                self.flush()
            return
        started = perf_counter_ns()
        durable = flags & FUA and not self.open_flags.no_flush
        if durable:
            self._check_flushed()
        end = offset + length
        growing = end > self._length.value
        if growing and self.is_device:
            raise self._failed(Stats.WRITE, "write", offset, length, OSError(errno.ENOSPC, ""))
        if growing:
            self._length.begin()
        reached = 0
        try:
            self._write_pieces(offset, buffers, self._dsync if durable else 0)
            reached = end
        except (OSError, OverflowError) as error:
            if durable:
                self._flush_failure = self._flush_failure or str(error)
            reached = self._real_end() if growing else 0
            raise self._failed(Stats.WRITE, "write", offset, length, error) from None
        finally:
            if growing:
                self._length.end(reached)
        self.stats.done(1, length, started)
        if end > self.stats.highest_written:
            self.stats.wrote(end)
        if durable and not self._dsync:
            self.flush()

    def _write_pieces(self, offset: int, buffers: Sequence[memoryview], sync: int) -> None:
        write = self._write_all if self._direct is None else self._direct.writev_from
        try:
            write(offset, buffers, sync)
        except OSError as error:
            if not sync or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._dsync = 0  # this file system knows no durable writes; the caller flushes instead
            write(offset, buffers, 0)

    def _write_all(self, offset: int, buffers: Sequence[memoryview], sync: int) -> None:
        """All of ``buffers`` from ``offset``, however often the system stops early."""
        _pwritev_all(self._fd, offset, buffers, sync)

    def _write_tail(self, offset: int, buffers: Sequence[memoryview], sync: int) -> None:
        """The last, partial block of a file in direct mode goes through the page cache: its length is exact then.

        Direct requests to the same block make the system write it back first.
        """
        with self._lock:
            if self._tail_fd < 0:
                self._tail_fd = descriptor.reopen_descriptor(self._fd, self.filename, self.identity,
                                                             read_only=False, direct=False).fd  # fmt: skip
        _pwritev_all(self._tail_fd, offset, buffers, sync)

    def _real_end(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError:
            return 0

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnly("the file is open read-only", where=self._where)

    def _failed(self, kind: int, verb: str, offset: int, length: int, error: OSError | OverflowError) -> ByreError:
        """Count the failure and word it."""
        self.stats.failed(kind)
        if isinstance(error, OverflowError):
            return InvalidArgument(f"cannot {verb} {length} bytes at {offset:#x}: beyond 2^63", where=self._where)
        return from_oserror(error, f"cannot {verb} {length} bytes at {offset:#x}", self._where)

    # -- flushing ---------------------------------------------------------------------------------

    def flush(self) -> None:
        """:raises IOFailure: this flush failed, or one before: what was written since the last good one may be lost"""
        if self.open_flags.no_flush or self.read_only:
            return
        self._check_flushed()
        changes = self._change_count()
        if changes == self._flushed:
            return
        started = perf_counter_ns()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # The system may have marked the pages clean: a second call that succeeds would prove nothing.
            self._flush_failure = self._flush_failure or os.strerror(error.errno or errno.EIO)
            self.stats.failed(Stats.FLUSH)
            raise from_oserror(error, "cannot flush", self._where) from None
        with self._lock:
            self._flushed = max(self._flushed, changes)
        self.stats.done(Stats.FLUSH, 0, started)

    def _change_count(self) -> int:
        """Grows with every change made through this node, failed ones included."""
        done, failed = self.stats.operation_count, self.stats.failed_count
        counts = [done[kind] + failed[kind] for kind in (Stats.WRITE, Stats.ZEROES, Stats.DISCARD)]
        return sum(counts) + self._other_changes

    def _check_flushed(self) -> None:
        if self._flush_failure:
            raise IOFailure(f"an earlier flush failed ({self._flush_failure}), so data written before it may be lost",
                            where=self._where, hint="close the file and check what it holds")  # fmt: skip

    # -- zeroes and discards ----------------------------------------------------------------------

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if length > 0:
            self._check_writable()
            started = perf_counter_ns()
            try:
                if not self._zero(offset, length, flags):
                    self._zero_by_writing(offset, length, flags)
            except (OSError, OverflowError) as error:
                raise self._failed(Stats.ZEROES, "write zeroes to", offset, length, error) from None
            finally:
                self._data = (0, 0)
            self.stats.done(Stats.ZEROES, length, started)
            self.stats.wrote(offset + length)
        if flags & FUA:
            self.flush()

    def _zero_by_writing(self, offset: int, length: int, flags: int) -> None:
        if flags & NO_FALLBACK:
            raise NotSupported("the file system cannot zero a range without writing it", where=self._where)
        step = 1 << 20
        for start in range(offset, offset + length, step):
            self.write_from(start, zero_view(min(step, offset + length - start)))

    def _zero(self, offset: int, length: int, flags: int) -> bool:
        """Zero by a system call that moves no data; False if there is none."""
        if self.is_device:
            return self._zero_device(offset, length, flags)
        end = offset + length
        inside = min(end, self._length.value) - offset
        if flags & MAY_UNMAP and self._fallocate(space.PUNCH, offset, inside):
            self._grow(end)
            return True
        if self._fallocate(space.ZERO_RANGE, offset, length):
            return True
        # Without ZERO_RANGE (tmpfs): a hole reads as zeroes, and allocating it keeps the space.
        return self._fallocate(space.PUNCH, offset, inside) and self._fallocate(space.ALLOCATE, offset, length)

    def _zero_device(self, offset: int, length: int, flags: int) -> bool:
        unit = max(512, self._sector_size())
        start, end = align_up(offset, unit), align_down(offset + length, unit)
        if start >= end:
            return False
        mode = space.PUNCH if flags & MAY_UNMAP else space.ZERO_RANGE | 1
        if not self._fallocate(mode, start, end - start) and (
            flags & NO_FALLBACK or not space.device_zero(self._fd, start, end - start)
        ):
            return False
        if (offset, offset + length) != (start, end):
            if flags & NO_FALLBACK:
                return False
            self._zero_by_writing(offset, start - offset, 0)
            self._zero_by_writing(end, offset + length - end, 0)
        return True

    def _sector_size(self) -> int:
        return self._direct.alignment if self._direct is not None else descriptor.sector_size(self._fd)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate, remembering what this file system cannot do."""
        if length <= 0:
            return True
        if mode in self._cannot:
            return False
        end = offset + length
        growing = mode & 1 == 0 and end > self._length.value
        if growing:
            self._length.begin()
        reached = 0
        try:
            if self._direct is None:
                done = space.fallocate(self._fd, mode, offset, length)
            else:
                with self._direct.claim(offset, length):
                    done = space.fallocate(self._fd, mode, offset, length)
            reached = end if done else 0
        finally:
            if growing:
                self._length.end(reached)
        if not done:
            self._cannot |= {mode}
        return done

    def _grow(self, end: int) -> None:
        """Make the file at least ``end`` bytes long, with a hole."""
        if end <= self._length.value:
            return
        with self._length.setting():
            if end > self._length.value:
                os.ftruncate(self._fd, end)
                self._length.value = end

    def discard(self, offset: int, length: int) -> None:
        """Give the space back where ``discard=unmap`` was asked for; else nothing happens."""
        if not self.open_flags.unmap or length <= 0:
            return
        self._check_writable()
        started = perf_counter_ns()
        try:
            self._discard(offset, min(length, self._length.value - offset))
        except (OSError, OverflowError) as error:
            raise self._failed(Stats.DISCARD, "discard", offset, length, error) from None
        finally:
            self._data = (0, 0)
        self.stats.done(Stats.DISCARD, length, started)

    def _discard(self, offset: int, length: int) -> None:
        if not self.is_device:
            self._fallocate(space.PUNCH, offset, length)
            return
        if "discard" in self._cannot:
            return
        unit = max(512, self._sector_size())
        start, end = align_up(offset, unit), align_down(offset + length, unit)
        if start < end and not space.device_discard(self._fd, start, end - start):
            self._cannot |= {"discard"}

    # -- what is where ----------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> Extent:
        """DATA, or ZERO for a hole (host = offset: the same place in the file) and past the end (no host)."""
        size = self._length.value
        if offset >= size:
            return Extent(offset, length, ZERO)
        length = min(length, size - offset)
        start, stop = self._data
        if not start <= offset < stop:
            if "seek" in self._cannot:
                return Extent(offset, length, DATA, offset)
            found = self._find_data(offset)
            if found is None or found[0] >= offset + length:
                return Extent(offset, length, ZERO, offset)
            start, stop = found
            if start > offset:
                return Extent(offset, start - offset, ZERO, offset)
            self._data = found
        return Extent(offset, min(length, stop - offset), DATA, offset)

    def _find_data(self, offset: int) -> tuple[int, int] | None:
        """The first data run at or behind ``offset``; the rest of the file if the system cannot tell."""
        try:
            found = space.next_data(self._fd, offset)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise from_oserror(error, f"cannot look for data at {offset:#x}", self._where) from None
            self._cannot |= {"seek"}
            return offset, 1 << 63
        if found is not None and found[1] <= offset:  # punched between the two calls
            return offset, offset + 1
        return found

    def extents(self, offset: int, length: int) -> ExtentMap:
        from ..io.extentmap import ExtentMap

        rows: list[Extent] = []
        at, end = offset, offset + length
        inside = min(end, self._length.value)
        while at < inside:
            found = self._find_data(at) if "seek" not in self._cannot else (at, inside)
            start, stop = found if found is not None else (inside, inside)
            start, stop = min(start, inside), min(stop, inside)
            if start > at:
                rows.append(Extent(at, start - at, ZERO, at))
            if stop > start:
                rows.append(Extent(start, stop - start, DATA, start))
            at = max(stop, start)
        if end > max(at, offset):
            rows.append(Extent(max(at, offset), end - max(at, offset), ZERO))
        return ExtentMap.from_extents(rows).coalesced()

    # -- copying ----------------------------------------------------------------------------------

    def copy_range(self, source_offset: int, target: FileNode, target_offset: int, length: int) -> int:
        """Let the system copy bytes to another file; it may share them or stop early.

        :returns: bytes copied, 0 at the end of this file
        :raises NotSupported: the system cannot copy between these two
        """
        target._check_writable()
        growing = target_offset + length > target._length.value
        if growing:
            target._length.begin()
        done = 0
        try:
            done = os.copy_file_range(self._fd, target._fd, length, source_offset, target_offset)
        except OSError as error:
            if error.errno in _NO_COPY:
                raise NotSupported(f"the system cannot copy this range: {os.strerror(error.errno)}",
                                   where=target._where) from None  # fmt: skip
            raise from_oserror(error, f"cannot copy {length} bytes to {target_offset:#x}", target._where) from None
        finally:
            if growing:
                target._length.end(target_offset + done if done else 0)
            target._changed_otherwise()
        return done

    # -- permissions and life ---------------------------------------------------------------------

    def set_permissions(self, used: int, shared: int) -> None:
        if not self.closed:
            unshared = 0 if self.open_flags.force_share else PERM_ALL & ~shared
            self._locks.change(self._fd, used & PERM_ALL, unshared)

    def reopen_prepare(self, flags: OpenFlags) -> object:
        """Open the file again for ``flags``; nothing changes before :meth:`reopen_commit`.

        The caller has stopped requests until then.

        :raises ByreError: it cannot be opened like that
        """
        opened = descriptor.reopen_descriptor(self._fd, self.filename, self.identity,
                                              read_only=flags.read_only, direct=flags.direct)  # fmt: skip
        try:
            direct, limits = self._prepare_direct(opened, flags)
            self._locks.copy_to(opened.fd)
        except BaseException:
            os.close(opened.fd)
            raise
        return _Reopen(opened, flags, direct, limits)

    def reopen_commit(self, token: object) -> None:
        assert isinstance(token, _Reopen)
        self._locks.copy_to(token.opened.fd)  # permissions may have changed since
        old = self._fd
        self._fd = token.opened.fd
        self.open_flags = token.flags
        self.read_only = token.opened.read_only
        self._direct, self.limits = token.direct, token.limits
        descriptor.close_quietly(old)

    def reopen_abort(self, token: object) -> None:
        assert isinstance(token, _Reopen)
        descriptor.close_quietly(token.opened.fd)

    def close(self) -> None:
        """:raises IOFailure: the system reports at closing that data was lost (network file systems do)"""
        self.closed = True
        fd, self._fd = self._fd, -1
        tail, self._tail_fd = self._tail_fd, -1
        if tail >= 0:
            descriptor.close_quietly(tail)
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                raise from_oserror(error, "cannot close", self._where) from None


def _pwritev_all(fd: int, offset: int, buffers: Sequence[memoryview], sync: int) -> None:
    for first in range(0, len(buffers), _IOV_MAX):
        batch = buffers[first : first + _IOV_MAX]
        length = sum(map(len, batch))
        while length > 0:
            done = pwritev(fd, batch, offset, sync)
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            offset += done
            length -= done
            if length:
                batch = _behind(batch, done)


def _behind(buffers: Sequence[memoryview], skip: int) -> list[memoryview]:
    """The buffers without their first ``skip`` bytes."""
    index = 0
    while skip >= len(buffers[index]):
        skip -= len(buffers[index])
        index += 1
    return [buffers[index][skip:], *buffers[index + 1 :]]


def check_preallocation(mode: str, before: int, after: int, where: str) -> None:
    """:raises ByreError: the mode is unknown here, or makes no sense for this change of size"""
    if mode not in ("off", "falloc", "full"):
        raise NotSupported(f"preallocation {mode!r} is not for files; they know off, falloc and full", where=where)
    if mode != "off" and after < before:
        raise InvalidArgument(f"preallocation {mode!r} makes no sense when a file shrinks", where=where)


def set_length(fd: int, before: int, after: int, preallocation: str) -> None:
    """Make the file behind ``fd`` ``after`` bytes long; a failed growth leaves the old length.

    :raises OSError: the system's
    """
    if preallocation == "off" or after == before:
        os.ftruncate(fd, after)
        return
    try:
        if preallocation == "falloc":
            os.posix_fallocate(fd, before, after - before)
            return
        os.ftruncate(fd, after)
        step = 1 << 20
        for start in range(before, after, step):
            _pwritev_all(fd, start, (zero_view(min(step, after - start)),), 0)
        os.fdatasync(fd)
    except BaseException:
        os.ftruncate(fd, before)
        raise


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
                                        auto_read_only=flags.auto_read_only, implicit=request.implicit)  # fmt: skip
    try:
        if driver == "host_device" and not opened.is_device:
            raise InvalidArgument("driver 'host_device' needs a block device", where=printable(path),
                                  hint="driver 'file' opens regular files")  # fmt: skip
        node = FileNode(path, opened, flags, name=request.name, locking=request.options.word("locking"))
    except BaseException:
        os.close(opened.fd)
        raise
    node.driver = driver
    return node


def create(path: str, options: OptionValues) -> None:
    """Create ``path``, or empty it if nobody uses it; see :func:`.filecreate.create_file`."""
    from .filecreate import create_file

    create_file(path, options)
