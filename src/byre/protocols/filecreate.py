"""Creating regular files, and emptying those nobody uses."""

from __future__ import annotations

import fcntl
import os
import struct

from ..errors import InvalidArgument, from_oserror, printable
from ..graph.node import PERM_RESIZE, PERM_WRITE
from ..typing import TYPE_CHECKING, Final
from ..units import MIB, SECTOR, align_up
from . import descriptor
from .length import check_preallocation, set_length
from .locks import FileLocks

if TYPE_CHECKING:
    from ..options import OptionValues

__all__ = ["create_file"]

_DEFAULT_HINT: Final = MIB
_SIZE_LIMIT: Final = (1 << 63) - SECTOR

_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_NOCOW: Final = 0x00800000
_GETXATTR: Final = 0x801C581F
_SETXATTR: Final = 0x401C5820
_XATTR: Final = struct.Struct("=IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
_XFLAG_EXTSIZE: Final = 0x800


def create_file(path: str, options: OptionValues) -> None:
    """Create ``path`` with ``size`` (rounded up to 512) zero bytes; an existing file loses its content.

    On a block device, which keeps its size, only the first sector is cleared.

    :raises Busy: another process uses the file; it is as it was
    :raises ByreError: a file that was made here is removed again
    """
    where = printable(path)
    size = align_up(options.number("size"), SECTOR)
    hint = options.optional_number("extent_size_hint")
    mode = options.word("preallocation")
    if size > _SIZE_LIMIT:
        raise InvalidArgument(f"size {size} is too large, allowed are {_SIZE_LIMIT} bytes", where=where)
    if hint is not None and hint >= 1 << 32:
        raise InvalidArgument(f"extent_size_hint {hint} is too large, allowed are {(1 << 32) - 1} bytes", where=where)
    opened, made = _open_or_make(path, where)
    try:
        if opened.is_device:
            _clear_device(opened, size, where)
        else:
            _set_up(opened.fd, path, where, size, mode, options.flag("nocow"), hint)
    except BaseException:
        if made:
            _remove(path, opened.identity)
        raise
    finally:
        descriptor.close_quietly(opened.fd)


def _open_or_make(path: str, where: str) -> tuple[descriptor.Descriptor, bool]:
    """(the open file, whether it was made here)."""
    try:
        # Made exclusively, so that "made here" is certain; a dangling link is followed to where it points.
        target = os.path.realpath(path) if os.path.islink(path) else path
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return descriptor.open_descriptor(path, read_only=False), False
    except OSError as error:
        raise from_oserror(error, "cannot create", where) from None
    except ValueError:
        raise InvalidArgument("a file name cannot hold a zero byte", where=where) from None
    status = os.fstat(fd)
    return descriptor.Descriptor(fd, False, False, (status.st_dev, status.st_ino)), True


def _set_up(fd: int, path: str, where: str, size: int, mode: str, nocow: bool, hint: int | None) -> None:
    check_preallocation(mode, 0, size, where)
    _lock(fd, path)
    try:
        os.ftruncate(fd, 0)
        if nocow:
            _set_nocow(fd)
        _set_extent_hint(fd, _DEFAULT_HINT if hint is None else hint)
        set_length(fd, 0, size, mode)
    except OSError as error:
        raise from_oserror(error, f"cannot make it {size} bytes long", where) from None


def _lock(fd: int, path: str) -> None:
    """Held until the file is closed. Emptying a file suits nobody who writes it, so writing is not shared either."""
    FileLocks("auto", path).change(fd, PERM_WRITE | PERM_RESIZE, PERM_WRITE | PERM_RESIZE)


def _set_nocow(fd: int) -> None:
    """An optimization on btrfs, nothing elsewhere."""
    try:
        flags = struct.unpack("@l", fcntl.ioctl(fd, _GETFLAGS, bytes(8)))[0]
        fcntl.ioctl(fd, _SETFLAGS, struct.pack("@l", flags | _NOCOW))
    except OSError:
        pass


def _set_extent_hint(fd: int, hint: int) -> None:
    """Keeps xfs from fragmenting files that are written in random order; nothing where it is not known."""
    try:
        flags, _, count, project, cow = _XATTR.unpack(fcntl.ioctl(fd, _GETXATTR, bytes(_XATTR.size)))
        fcntl.ioctl(fd, _SETXATTR, _XATTR.pack(flags | _XFLAG_EXTSIZE, hint, count, project, cow))
    except OSError:
        pass


def _clear_device(opened: descriptor.Descriptor, size: int, where: str) -> None:
    have = descriptor.file_size(opened.fd, True, where)
    if size > have:
        raise InvalidArgument(f"the device has {have} bytes, {size} are needed", where=where)
    _lock(opened.fd, where)
    try:
        os.pwrite(opened.fd, bytes(SECTOR), 0)  # an old image must not be found there
        os.fsync(opened.fd)
    except OSError as error:
        raise from_oserror(error, "cannot clear the first sector", where) from None


def _remove(path: str, identity: object) -> None:
    """Remove ``path`` if it is still the file that was made."""
    target = os.path.realpath(path)
    try:
        status = os.lstat(target)
        if (status.st_dev, status.st_ino) == identity:
            os.unlink(target)
    except OSError:
        pass
