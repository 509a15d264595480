"""Space of open files: zero, punch and allocate ranges, find data and holes.

Thin calls on file descriptors. Each answers False where the system cannot do it, and raises OSError
where it tried and failed; :mod:`.filespace` remembers the one, :mod:`.file` words the other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from functools import lru_cache

from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ctypes

__all__ = ["ALLOCATE", "KEEP_SIZE", "PUNCH", "ZERO_RANGE", "allocates_late", "device_discard", "device_zero",
           "fallocate", "in_memory", "next_data"]  # fmt: skip

KEEP_SIZE: Final = 1
ALLOCATE: Final = 0
PUNCH: Final = 2 | KEEP_SIZE
ZERO_RANGE: Final = 16

_EXT4: Final = 0xEF53
_TMPFS: Final = 0x01021994
_RAMFS: Final = 0x858458F6
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_CANNOT: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV)
_OFFSET_LIMIT: Final = 1 << 63


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    import ctypes

    # CDLL lets other threads run during a call; PyDLL would not.
    return ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2) with ``mode`` PUNCH (size kept), ZERO_RANGE or ALLOCATE (both extend the file).

    :returns: False if this file system cannot
    :raises OSError: it can, and failed
    """
    if length <= 0:
        return True
    if offset + length >= _OFFSET_LIMIT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    import ctypes

    libc = _libc()
    call = getattr(libc, "fallocate64", None) or libc.fallocate
    while call(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number in _CANNOT:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def allocates_late(fd: int) -> bool:
    """Whether the file system is ext4, which reserves space page by page at each write unless it is allocated."""
    return _file_system(fd) == _EXT4


def in_memory(fd: int) -> bool:
    """Whether the file system has no disk: tmpfs or ramfs."""
    return _file_system(fd) in (_TMPFS, _RAMFS)


def _file_system(fd: int) -> int:
    """The magic number of the file system, -1 if the system does not say."""
    import ctypes

    result = ctypes.create_string_buffer(256)
    if _libc().fstatfs(ctypes.c_int(fd), result) != 0:
        return -1
    return int.from_bytes(result.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)


def device_discard(fd: int, offset: int, length: int) -> bool:
    """Discard whole sectors of a block device."""
    return _range_ioctl(fd, _BLKDISCARD, offset, length)


def device_zero(fd: int, offset: int, length: int) -> bool:
    """Zero whole sectors of a block device."""
    return _range_ioctl(fd, _BLKZEROOUT, offset, length)


def _range_ioctl(fd: int, operation: int, offset: int, length: int) -> bool:
    try:
        fcntl.ioctl(fd, operation, struct.pack("@QQ", offset, length))
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def next_data(fd: int, offset: int) -> tuple[int, int] | None:
    """``(start, end)`` of the first data at or behind ``offset``; ``None`` if only a hole follows.

    :raises OSError: EINVAL where the file system cannot tell
    """
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
        return start, os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
