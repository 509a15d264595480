"""Places that bytes can only be written to, one after the other: pipes, sockets, standard output.

No node: there is nothing to read, nor a place to go back to. Users are the formats that can be written as a stream.
"""

from __future__ import annotations

import os
import stat

from ..errors import from_oserror, printable
from ..typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Sink", "is_sink"]


def is_sink(path: str) -> bool:
    """Whether ``path`` is there, and is no place that keeps what is written."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class Sink:
    """An open sink; a context manager.

    :param path: a FIFO, /dev/stdout, ...; "-" for standard output
    :raises ByreError: it cannot be opened
    """

    def __init__(self, path: str) -> None:
        self._where = "standard output" if path == "-" else printable(path)
        try:
            # Opening a FIFO waits for its reader, whom the user named with it.
            self._fd = os.dup(1) if path == "-" else os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise from_oserror(error, "cannot open for writing", self._where) from None
        self.written = 0

    def write(self, data: bytes) -> None:
        """All of ``data``; waits for whoever reads.

        :raises ByreError: nobody reads any more
        """
        view = memoryview(data)
        while view:
            try:
                done = os.write(self._fd, view)
            except OSError as error:
                action = f"cannot write {len(view)} bytes at {self.written:#x}"
                raise from_oserror(error, action, self._where) from None
            self.written += done
            view = view[done:]

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                raise from_oserror(error, "cannot close", self._where) from None

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:  # fmt: skip
        self.close()
