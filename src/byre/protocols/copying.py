"""Copying between files by the system, which may share the bytes on disk instead."""

from __future__ import annotations

import errno
import os
from time import perf_counter_ns

from ..errors import NotSupported
from ..graph.node import Stats
from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .file import FileNode

__all__ = ["copy_range"]

_NO_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM)


def copy_range(source: FileNode, source_offset: int, target: FileNode, target_offset: int, length: int) -> int:
    """See :meth:`.file.FileNode.copy_range`."""
    target._check_writable()
    started = perf_counter_ns()
    growing = target_offset + length > target._length.value
    if growing:
        target._length.begin()
    done = 0
    try:
        with target._space.claim(target_offset, length):
            done = os.copy_file_range(source._fd, target._fd, length, source_offset, target_offset)
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise target._failed(Stats.WRITE, "copy", target_offset, length, error) from None
        reason = os.strerror(error.errno)
        raise NotSupported(f"the system cannot copy this range: {reason}", where=target._where) from None
    finally:
        if growing:
            target._length.end(target_offset + done if done else 0)
    source.stats.done(Stats.READ, done, started)
    target.stats.done(Stats.WRITE, done, started)
    target.stats.wrote(target_offset + done)
    return done
