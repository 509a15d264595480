"""Image locks between processes: the byte-range locks QEMU takes on an image file.

For each permission a process uses on the file it holds a shared lock on byte ``100 + bit``, for each it
does not let others use one on byte ``200 + bit``; bits are consistent read 0, write 1, write unchanged 2,
resize 3. After locking it asks whether anyone holds the byte that contradicts. Locks belong to the open
file description, so two nodes of one process exclude each other as two processes do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..errors import Busy, NotSupported, from_oserror, printable
from ..graph.node import PERM_NAMES
from ..typing import Final

__all__ = ["FileLocks"]

_USED_BASE: Final = 100
_UNSHARED_BASE: Final = 200
_BITS: Final = tuple((bit, bit.bit_length() - 1, name) for bit, name in PERM_NAMES.items())
_FLOCK: Final = struct.Struct("@hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid
_SETLK: Final = getattr(fcntl, "F_OFD_SETLK", None)
_GETLK: Final = getattr(fcntl, "F_OFD_GETLK", None)
_UNAVAILABLE: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)
_TAKEN: Final = (errno.EAGAIN, errno.EACCES)


def _operate(fd: int, operation: int, kind: int, byte: int) -> int:
    """One fcntl over one byte; the lock type it answers."""
    answer = fcntl.fcntl(fd, operation, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0])


class FileLocks:
    """The locks one node holds on one open file.

    Not thread-safe: permissions change under the graph lock only.

    :ivar used: permission bits locked as used
    :ivar unshared: permission bits locked as not shared
    :ivar enabled: False where locking is off, or found to be unavailable with ``mode`` "auto"
    """

    def __init__(self, mode: str, filename: str) -> None:
        self.mode = mode
        self.enabled = mode != "off"
        self.used = 0
        self.unshared = 0
        self._required = mode == "on"
        self._filename = filename
        if self.enabled and (_SETLK is None or _GETLK is None):
            self._unavailable(OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)))

    def change(self, fd: int, used: int, unshared: int) -> None:
        """Hold exactly these: lock what is new, ask whether that contradicts anyone, unlock what is old.

        :raises Busy: it does; the locks are as they were
        :raises NotSupported: the file system has no such locks and they were asked for
        """
        if not self.enabled or (used == self.used and unshared == self.unshared):
            return
        before = self.used, self.unshared
        new_used, new_unshared = used & ~self.used, unshared & ~self.unshared
        try:
            self._lock(fd, new_used, new_unshared)
            self._test(fd, new_used, new_unshared)
        except OSError as error:
            self._restore(fd, *before)
            if error.errno not in _UNAVAILABLE:
                raise from_oserror(error, "cannot lock the image", printable(self._filename)) from None
            self._unavailable(error)
            return
        except BaseException:
            self._restore(fd, *before)
            raise
        self._restore(fd, used, unshared)

    def copy_to(self, fd: int) -> None:
        """Hold what is held now, and nothing else, on another open description of the file; asks nobody."""
        if not self.enabled:
            return
        try:
            for bit, index, _ in _BITS:
                self._set(fd, _USED_BASE + index, bool(self.used & bit))
                self._set(fd, _UNSHARED_BASE + index, bool(self.unshared & bit))
        except OSError as error:
            raise from_oserror(error, "cannot lock the image", printable(self._filename)) from None

    def _unavailable(self, error: OSError) -> None:
        if self._required:
            raise NotSupported(
                f"image locking was asked for, but the file system cannot do it: {error.strerror}",
                where=printable(self._filename),
                hint="use locking=auto or locking=off",
            )
        self.enabled = False
        self.used = self.unshared = 0

    def _busy(self, message: str) -> Busy:
        name = printable(self._filename)
        return Busy(message, where=name, hint=f"Is another process using the image [{name}]?")

    def _set(self, fd: int, byte: int, held: bool) -> None:
        assert _SETLK is not None
        try:
            _operate(fd, _SETLK, fcntl.F_RDLCK if held else fcntl.F_UNLCK, byte)
        except OSError as error:
            if error.errno in _TAKEN:
                raise self._busy(f"failed to lock byte {byte}") from None
            raise

    def _lock(self, fd: int, used: int, unshared: int) -> None:
        for bit, index, _ in _BITS:
            if used & bit:
                self._set(fd, _USED_BASE + index, True)
                self.used |= bit
            if unshared & bit:
                self._set(fd, _UNSHARED_BASE + index, True)
                self.unshared |= bit

    def _test(self, fd: int, used: int, unshared: int) -> None:
        assert _GETLK is not None
        for bit, index, name in _BITS:
            if used & bit and _operate(fd, _GETLK, fcntl.F_WRLCK, _UNSHARED_BASE + index) != fcntl.F_UNLCK:
                raise self._busy(f'failed to get "{name}" lock')
        for bit, index, name in _BITS:
            if unshared & bit and _operate(fd, _GETLK, fcntl.F_WRLCK, _USED_BASE + index) != fcntl.F_UNLCK:
                raise self._busy(f'failed to get shared "{name}" lock')

    def _restore(self, fd: int, used: int, unshared: int) -> None:
        """Unlock all that is held beyond ``used`` and ``unshared``."""
        try:
            for bit, index, _ in _BITS:
                if self.used & bit & ~used:
                    self._set(fd, _USED_BASE + index, False)
                if self.unshared & bit & ~unshared:
                    self._set(fd, _UNSHARED_BASE + index, False)
        except OSError:  # unlocking fails only where locking does; closing the file drops the locks anyway
            pass
        self.used &= used
        self.unshared &= unshared
