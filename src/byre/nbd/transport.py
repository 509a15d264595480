"""A connected byte stream under NBD: plain socket or TLS, with limits on how long the other side may be silent.

One thread may send while another receives. Sockets stay blocking; the system's own receive and send time-outs
bound each call, which costs no further system call.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from time import monotonic
from typing import TYPE_CHECKING, Final

from ..errors import ByreError, IOFailure, from_oserror

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from .tls import TlsStream
    from .uri import Address

__all__ = ["Disconnected", "Silence", "Transport", "connect"]

_IOV_MAX: Final = 1024


class Disconnected(IOFailure):
    """The other side closed the connection, or the system did."""


class Silence(Exception):
    """Nothing came within the time limit; the connection is as it was."""


class Transport:
    """A connected socket. Sending is the business of one thread at a time, receiving as well.

    :param where: for messages
    """

    def __init__(self, sock: socket.socket, where: str) -> None:
        self.where = where
        self.tls = False
        self._socket = sock
        self._session: TlsStream | None = None

    def set_limits(self, receive: float, send: float) -> None:
        """How long one call may wait without a single byte, seconds; 0 for ever."""
        for option, limit in ((socket.SO_RCVTIMEO, receive), (socket.SO_SNDTIMEO, send)):
            micro = max(int(limit * 1_000_000), 1) if limit else 0
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *divmod(micro, 1_000_000)))

    # -- receiving --------------------------------------------------------------------------------

    def receive_into(self, view: memoryview, *, whole: bool = False) -> int:
        """Put at least one byte into ``view``, all of it if ``whole`` and nothing goes wrong; how many.

        :raises Disconnected: the stream ended, or broke
        :raises Silence: nothing came within the limit
        """
        try:
            if self._session is not None:
                count = self._session.recv_into(view)
            else:
                count = self._socket.recv_into(view, len(view), socket.MSG_WAITALL if whole else 0)
        except OSError as error:
            raise self._failed(error, "receive") from None
        if count == 0:
            raise self._ended()
        return count

    def receive_exactly(self, length: int, deadline: float) -> bytes:
        """``length`` bytes; for the handshake.

        :param deadline: on the clock of :func:`time.monotonic`
        :raises Disconnected: the stream ended before
        :raises IOFailure: they did not come in time
        """
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            left = deadline - monotonic()
            if left <= 0:
                raise self._too_late()
            self.set_limits(left, left)
            try:
                done += self.receive_into(view[done:], whole=True)
            except Silence:
                raise self._too_late() from None
        return bytes(data)

    def _too_late(self) -> IOFailure:
        return IOFailure("the server did not finish the handshake in time", where=self.where, errno=errno.ETIMEDOUT)

    def _ended(self) -> Disconnected:
        return Disconnected("the connection was closed by the other side", where=self.where)

    def _failed(self, error: OSError, verb: str) -> Exception:
        if isinstance(error, BlockingIOError):
            return Silence()
        return Disconnected(f"cannot {verb}: {os.strerror(error.errno or errno.EIO)}", where=self.where)

    # -- sending ----------------------------------------------------------------------------------

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all ``parts``, in as few calls as possible.

        :raises Disconnected: the connection broke, or the other side takes nothing any more
        """
        try:
            if self._session is not None:
                self._session.send_all(parts)
                return
            if len(parts) == 1:
                sent = self._socket.send(parts[0])
            else:
                sent = self._socket.sendmsg(parts[:_IOV_MAX])
            if sent != sum(map(len, parts)):
                self._send_rest(parts, sent)
        except OSError as error:
            raise self._not_sent(error) from None

    def _send_rest(self, parts: Sequence[bytes | memoryview], sent: int) -> None:
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
                continue
            view = memoryview(part)[sent:]
            sent = 0
            while view:
                view = view[self._socket.send(view) :]

    def _not_sent(self, error: OSError) -> Disconnected:
        if isinstance(error, BlockingIOError):
            return Disconnected("the other side has stopped taking requests", where=self.where)
        return Disconnected(f"cannot send: {os.strerror(error.errno or errno.EIO)}", where=self.where)

    # -- TLS --------------------------------------------------------------------------------------

    def start_tls(self, context: ssl.SSLContext, hostname: str | None, deadline: float) -> None:
        """Become a TLS session, as the client.

        :param hostname: the name the certificate must be for; ``None`` where ``context`` does not ask
        :raises AccessDenied: a certificate, on either side, is not accepted
        :raises ByreError: TLS could not be set up
        """
        from .tls import TlsStream

        stream = TlsStream(self._socket, context, server_side=False, server_hostname=hostname)
        try:
            stream.handshake(deadline)
            self._socket.settimeout(None)
        except OSError as error:
            raise self._not_sent(error) from None
        self._session = stream
        self.tls = True

    # -- life -------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Wake whoever sends or receives; the descriptor stays."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is not connected any more

    def close(self) -> None:
        self._socket.close()


def connect(address: Address, deadline: float, *, families: str = "any", keep_alive: bool = False) -> Transport:
    """A new connection.

    :param families: "any", "ipv4" or "ipv6"
    :param deadline: on the clock of :func:`time.monotonic`
    :raises ByreError: nobody listens there, the name is unknown, the time is over
    """
    where = str(address)
    try:
        if address.kind == "inet":
            sock = _connect_inet(address, deadline, families)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1 if keep_alive else 0)
        elif address.kind == "fd":
            sock = socket.socket(fileno=os.dup(address.fd))
        else:
            sock = _connect_one(*_local(address), deadline)
        sock.settimeout(None)
    except (OSError, ValueError, OverflowError) as error:
        raise _not_connected(error, where) from None
    return Transport(sock, where)


def _local(address: Address) -> tuple[int, object]:
    if address.kind == "vsock":
        return socket.AF_VSOCK, (address.cid, address.port)
    return socket.AF_UNIX, address.path


def _connect_inet(address: Address, deadline: float, families: str) -> socket.socket:
    """The first of the name's addresses that answers; one that does not leaves time for the others."""
    family = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}.get(families, socket.AF_UNSPEC)
    failure: OSError = OSError(errno.EHOSTUNREACH, "")
    found = socket.getaddrinfo(address.host, address.port, family, socket.SOCK_STREAM)
    for index, (kind, _, _, _, place) in enumerate(found):
        now = monotonic()
        try:
            return _connect_one(kind, place, now + (deadline - now) / (len(found) - index))
        except OSError as error:
            failure = error
    raise failure


def _connect_one(family: int, place: object, deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(max(deadline - monotonic(), 0.001))
        sock.connect(place)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


def _not_connected(error: Exception, where: str) -> ByreError:
    action = f"Failed to connect to '{where}'"
    if isinstance(error, socket.gaierror):
        return IOFailure(f"{action}: {error.strerror}")
    if isinstance(error, TimeoutError):
        return IOFailure(f"{action}: no answer in time", errno=errno.ETIMEDOUT)
    if isinstance(error, OSError) and error.errno:
        return from_oserror(error, action, "")
    return IOFailure(f"{action}: {error}", errno=errno.EINVAL)
