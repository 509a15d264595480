"""The connection below the transmission phase: bytes in, whole messages out; plain or through TLS.

One thread receives; any number of threads send, each message in one piece. OSError passes through: an end of the
connection for those who send, "nothing yet" (``BlockingIOError``) for the one who receives.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .tls import TlsStream

__all__ = ["Buffer", "Link", "PlainLink", "TlsLink"]

Buffer = bytes | bytearray | memoryview

_IOV_MAX: Final = 1024
_DONT_WAIT: Final = int(socket.MSG_DONTWAIT)
_ZEROES: Final = bytes(1 << 16)
_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF, errno.ETIMEDOUT, errno.ECONNABORTED)


class Link(Protocol):
    """
    :ivar can_send_files: :meth:`send_file` may be called
    :ivar recv_now: bytes received without waiting, or ``BlockingIOError``; ``None`` if that cannot be told
    """

    can_send_files: bool
    recv_now: Callable[[memoryview], int] | None

    def recv_into(self, view: memoryview) -> int:
        """Bytes received; 0 when the other side has ended its half."""

    def recv_all_into(self, view: memoryview) -> int:
        """The same, but as much as comes before the time limit, if the system can."""

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send one message."""

    def send_each(self, buffers: Iterable[Buffer]) -> None:
        """Send one message whose parts are made while it is sent; if making one fails, it stays incomplete."""

    def send_file(self, header: Buffer, fd: int, offset: int, length: int) -> int:
        """Send ``header`` and ``length`` bytes of a file, zeroes past its end.

        :returns: 0, or the errno of a read that failed: the rest is zeroes then
        """


class PlainLink:
    """A connected stream socket without a timeout of its own. Guarded by ``_sending``: the order of what goes out."""

    can_send_files = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.recv_into = sock.recv_into
        self.recv_now: Callable[[memoryview], int] | None = partial(sock.recv_into, flags=_DONT_WAIT)
        self._sending = threading.Lock()

    def recv_all_into(self, view: memoryview) -> int:
        return self._socket.recv_into(view, 0, socket.MSG_WAITALL)

    def send(self, buffers: Sequence[Buffer]) -> None:
        with self._sending:
            if len(buffers) == 1:
                self._socket.sendall(buffers[0])
                return
            for first in range(0, len(buffers), _IOV_MAX):
                self._send_gathered(buffers[first : first + _IOV_MAX])

    def send_each(self, buffers: Iterable[Buffer]) -> None:
        with self._sending:
            for buffer in buffers:
                self._socket.sendall(buffer)

    def _send_gathered(self, buffers: Sequence[Buffer]) -> None:
        done = self._socket.sendmsg(buffers)
        for buffer in buffers:
            if done < len(buffer):
                self._socket.sendall(memoryview(buffer)[done:])
                done = 0
            else:
                done -= len(buffer)

    def send_file(self, header: Buffer, fd: int, offset: int, length: int) -> int:
        with self._sending:
            self._socket.sendall(header)
            out = self._socket.fileno()
            while length > 0:
                try:
                    done = os.sendfile(out, fd, offset, length)
                except OSError as error:
                    if error.errno in _GONE:
                        raise
                    self._send_zeroes(length)
                    return error.errno or errno.EIO
                if done == 0:
                    self._send_zeroes(length)
                    return 0
                offset += done
                length -= done
            return 0

    def _send_zeroes(self, length: int) -> None:
        while length > 0:
            step = min(length, len(_ZEROES))
            self._socket.sendall(memoryview(_ZEROES)[:step])
            length -= step


class TlsLink:
    """The same over TLS."""

    can_send_files = False
    recv_now: Callable[[memoryview], int] | None = None

    def __init__(self, stream: TlsStream) -> None:
        self.recv_into = self.recv_all_into = stream.recv_into
        self.send = self.send_each = stream.send_all

    def send_file(self, header: Buffer, fd: int, offset: int, length: int) -> int:
        raise AssertionError("files cannot be sent through TLS")
