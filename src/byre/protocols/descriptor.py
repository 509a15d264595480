"""Opening files: which kinds are accepted, how long they are, what direct I/O needs there.

Everything here works on paths and file descriptors; :mod:`byre.protocols.file` makes a node of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from ..errors import AccessDenied, InvalidArgument, NotFound, NotSupported, from_oserror, printable
from ..io.buffers import aligned_buffer
from ..typing import Final, NamedTuple

__all__ = [
    "Descriptor",
    "DirectLimits",
    "close_quietly",
    "file_size",
    "open_descriptor",
    "probe_direct",
    "reopen_descriptor",
    "sector_size",
]

_BLKSSZGET: Final = 0x1268
_DIRECT_ALIGNMENT: Final = 4096

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


class Descriptor(NamedTuple):
    """An open file.

    :ivar identity: (device, inode) of a file, ("device", number) of a block device
    :ivar is_device: a block or character device: it has no length that could be changed
    """

    fd: int
    read_only: bool
    is_device: bool
    identity: tuple[object, int]


class DirectLimits(NamedTuple):
    """What direct I/O on a file needs: of offsets and lengths, and of buffer addresses, in bytes."""

    alignment: int
    memory_alignment: int


def open_descriptor(
    path: str, *, read_only: bool, direct: bool = False, auto_read_only: bool = False, implicit: bool = False,
    character: bool = False,
) -> Descriptor:  # fmt: skip
    """Open a regular file or block device; never blocks on anything else.

    :param character: a character device will do as well, unless an image names it
    :param auto_read_only: open read-only where writing is denied
    :param implicit: an image names this path, not the user
    :raises NotFound, AccessDenied, InvalidArgument: it cannot be opened, or is something else
    :raises NotSupported: ``direct``, and the file system has no direct I/O
    """
    where = printable(path)
    if implicit and os.path.abspath(path).startswith(("/proc/", "/dev/fd/", "/dev/std")):
        raise AccessDenied("an image may not name files of a running process", where=where)
    character = character and not implicit
    # Looked at before it is opened as well: merely opening some devices does something.
    _check_kind(_stat(path, where), where, character)
    fd, read_only = _open(path, where, read_only, direct, auto_read_only)
    try:
        status = os.fstat(fd)
        _check_kind(status, where, character)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except OSError as error:
        os.close(fd)
        raise from_oserror(error, "cannot open", where) from None
    except BaseException:
        os.close(fd)
        raise
    return Descriptor(fd, read_only, _is_device(status), _identity(status))


def reopen_descriptor(
    fd: int, path: str, identity: object, *, read_only: bool, direct: bool = False, auto_read_only: bool = False
) -> Descriptor:
    """A new open description of the file behind ``fd``, which may have another name by now.

    :raises ByreError: it cannot be opened in that mode
    """
    where = printable(path)
    name = f"/proc/self/fd/{fd}" if os.path.exists(f"/proc/self/fd/{fd}") else path
    new, read_only = _open(name, where, read_only, direct, auto_read_only)
    try:
        status = os.fstat(new)
        if _identity(status) != identity:
            raise NotFound("another file has this name now, so it cannot be reopened", where=where)
        fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except BaseException:
        os.close(new)
        raise
    return Descriptor(new, read_only, _is_device(status), _identity(status))


def _stat(path: str, where: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise from_oserror(error, "cannot open", where) from None
    except ValueError:
        raise InvalidArgument("a file name cannot hold a zero byte", where=where) from None


def _check_kind(status: os.stat_result, where: str, character: bool) -> None:
    if character and stat.S_ISCHR(status.st_mode):
        return
    for test, what in _KINDS:
        if test(status.st_mode):
            raise InvalidArgument(f"this is {what}; only regular files and block devices hold images", where=where)
    if status.st_dev in _kernel_devices():
        raise AccessDenied("this is a file of the running kernel; only regular files and block devices hold images",
                           where=where)  # fmt: skip


def _kernel_devices() -> list[int]:
    """Device numbers of the mounted procfs and sysfs, whose files look regular."""
    found = []
    for folder in ("/proc", "/sys"):
        try:
            device = os.stat(folder).st_dev
        except OSError:
            continue
        if device != os.stat("/").st_dev:
            found.append(device)
    return found


def _is_device(status: os.stat_result) -> bool:
    return stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)


def _identity(status: os.stat_result) -> tuple[object, int]:
    if stat.S_ISCHR(status.st_mode):
        return "character device", status.st_rdev
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev
    return status.st_dev, status.st_ino


def _open(path: str, where: str, read_only: bool, direct: bool, auto_read_only: bool) -> tuple[int, bool]:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (os.O_DIRECT if direct else 0)
    try:
        return os.open(path, flags | (os.O_RDONLY if read_only else os.O_RDWR)), read_only
    except OSError as error:
        if auto_read_only and not read_only and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _open(path, where, True, direct, False)
        if direct and error.errno == errno.EINVAL:
            raise NotSupported("the file system does not support direct I/O (O_DIRECT)", where=where,
                               hint="use a cache mode that goes through the page cache, such as writeback",
                               errno=errno.EINVAL) from None  # fmt: skip
        what = "for reading" if read_only else "for writing"
        raise from_oserror(error, f"cannot open {what}", where) from None


def file_size(fd: int, is_device: bool, where: str) -> int:
    """:raises ByreError: the system does not say"""
    try:
        # A block device's size is where its end is; fstat says 0.
        return os.lseek(fd, 0, os.SEEK_END) if is_device else os.fstat(fd).st_size
    except OSError as error:
        raise from_oserror(error, "cannot read the size", where) from None


def sector_size(fd: int) -> int:
    """Logical block size of a block device, bytes."""
    try:
        size = int(struct.unpack("@i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])
    except OSError:
        return 512
    return size if size >= 512 and size & (size - 1) == 0 else 512


def probe_direct(descriptor: Descriptor, where: str) -> DirectLimits:
    """What direct I/O needs here, found by trying.

    Where trying proves nothing (an empty file, one hole) it is 4096, which suits every device known.

    :raises ByreError: even 4096 bytes cannot be read
    """
    fd = descriptor.fd
    try:
        if descriptor.is_device:
            return _try_memory(fd, 0, sector_size(fd))
        start = os.lseek(fd, 0, os.SEEK_DATA)
        start -= start % _DIRECT_ALIGNMENT
        if os.fstat(fd).st_size - start < _DIRECT_ALIGNMENT:
            return DirectLimits(_DIRECT_ALIGNMENT, _DIRECT_ALIGNMENT)
        for alignment in (512, 1024, 2048, _DIRECT_ALIGNMENT):
            # An offset that is a multiple of nothing larger shows what offsets need; its length what lengths do.
            offset = start + alignment if alignment < _DIRECT_ALIGNMENT else start
            if _readable(fd, offset, aligned_buffer(alignment)):
                return _try_memory(fd, start, alignment)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EINVAL):  # nothing but a hole; or SEEK_DATA is not known
            return DirectLimits(_DIRECT_ALIGNMENT, _DIRECT_ALIGNMENT)
        raise from_oserror(error, "cannot find out what direct I/O needs", where) from None
    raise NotSupported("direct I/O (O_DIRECT) refuses even aligned reads", where=where,
                       hint="use a cache mode that goes through the page cache, such as writeback")  # fmt: skip


def _try_memory(fd: int, offset: int, alignment: int) -> DirectLimits:
    """512 where a request from such an address works even across a page. Less may work for some pages only."""
    memory = aligned_buffer(3 * _DIRECT_ALIGNMENT)
    if _readable(fd, offset, memory[512 : 512 + _DIRECT_ALIGNMENT]):
        return DirectLimits(alignment, 512)
    return DirectLimits(alignment, _DIRECT_ALIGNMENT)


def _readable(fd: int, offset: int, buffer: memoryview) -> bool:
    try:
        os.preadv(fd, (buffer,), offset)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass
