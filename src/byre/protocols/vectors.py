"""Vectored writes that go on until all is written."""

from __future__ import annotations

import errno
import os
from os import pwritev

from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["IOV_MAX", "pwritev_all"]

IOV_MAX: Final = 1024
"""Buffers one system call takes."""


def pwritev_all(fd: int, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
    """Write ``buffers`` to consecutive bytes, however many calls it takes.

    :param flags: of pwritev2(2)
    :raises OSError: some of it may be written by then
    """
    for first in range(0, len(buffers), IOV_MAX):
        batch = buffers[first : first + IOV_MAX]
        length = sum(map(len, batch))
        while length > 0:
            done = pwritev(fd, batch, offset, flags)
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
