"""The exception tree: every failure byre reports is a :class:`ByreError`.

Each error carries an errno value, from which the NBD error, the QMP error and the
exit status are derived; ``where`` (a file, offset or table index) and ``hint`` (what to do).
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "Busy",
    "ByreError",
    "Cancelled",
    "Corrupt",
    "IOFailure",
    "ImageError",
    "InvalidArgument",
    "Mismatch",
    "NoSpace",
    "NotFound",
    "NotSupported",
    "OutOfService",
    "ProtocolError",
    "ReadOnly",
    "from_oserror",
    "printable",
]


class ByreError(Exception):
    """Base of all errors raised by byre.

    :param message: what was asked and what was found, without the file name
    :param where: the file (and offset or table index) it concerns; "" if unknown
    :param hint: what the user can do about it; "" if nothing
    :param errno: overrides the class's errno value
    """

    default_errno = _errno.EIO

    def __init__(self, message: str, *, where: str = "", hint: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.errno = errno or self.default_errno

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.hint}" if self.hint else text


class InvalidArgument(ByreError):
    """The request makes no sense."""

    default_errno = _errno.EINVAL


class NotSupported(ByreError):
    """The request makes sense, but not here."""

    default_errno = _errno.ENOTSUP


class NotFound(ByreError):
    default_errno = _errno.ENOENT


class AlreadyExists(ByreError):
    default_errno = _errno.EEXIST


class AccessDenied(ByreError):
    default_errno = _errno.EACCES


class ReadOnly(AccessDenied):
    default_errno = _errno.EROFS


class ImageError(ByreError):
    """Bytes break their format."""

    default_errno = _errno.EINVAL


class Corrupt(ImageError):
    """The image was opened and then found to contradict itself."""

    default_errno = _errno.EIO


class Mismatch(Corrupt):
    """Copies that should be equal differ; the message names the first byte."""


class Busy(ByreError):
    """Held by another node, job or process."""

    default_errno = _errno.EBUSY


class IOFailure(ByreError):
    """The system refused a transfer; carries the system's own errno."""

    default_errno = _errno.EIO


class OutOfService(IOFailure):
    """An earlier failure stopped the node: nothing will succeed before it is opened again, so nobody need try."""


class NoSpace(IOFailure):
    default_errno = _errno.ENOSPC


class ProtocolError(ByreError):
    """The peer broke NBD or QMP."""

    default_errno = _errno.EPROTO


class Cancelled(ByreError):
    default_errno = _errno.ECANCELED


_BY_ERRNO: dict[int, type[ByreError]] = {
    _errno.ENOENT: NotFound,
    _errno.EEXIST: AlreadyExists,
    _errno.EACCES: AccessDenied,
    _errno.EPERM: AccessDenied,
    _errno.EROFS: ReadOnly,
    _errno.EBUSY: Busy,
    _errno.ENOSPC: NoSpace,
    _errno.EDQUOT: NoSpace,
    _errno.EINVAL: InvalidArgument,
    _errno.ENOTSUP: NotSupported,
}


def from_oserror(error: OSError, action: str, where: str) -> ByreError:
    """The ByreError for a failed system call; ``action`` reads like "cannot read 512 bytes at 0x0"."""
    number = error.errno or _errno.EIO
    kind = _BY_ERRNO.get(number, IOFailure)
    return kind(f"{action}: {os.strerror(number)}", where=where, errno=number)


class _Escapes(dict[int, str]):
    """What each code point is shown as, found out once for a text: the way through `str.translate` takes 40 ns each."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        shown = character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        self[code] = shown
        return shown


def printable(text: str) -> str:
    """``text`` with control characters and undecodable bytes escaped, safe for a terminal."""
    return text if text.isprintable() else text.translate(_Escapes())
