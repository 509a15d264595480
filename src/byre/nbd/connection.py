"""One client from accept to close: the handshake with its deadline, TLS where it was agreed on, then transmission."""

from __future__ import annotations

import select
import socket
import struct
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import AccessDenied, ProtocolError, printable
from .link import Link, PlainLink, TlsLink
from .server_negotiation import (
    TLS_OPTIONAL,
    TLS_REQUIRED,
    TLS_UNAVAILABLE,
    Agreement,
    ClientLeft,
    Negotiation,
    Offer,
    StartTls,
)
from .transmission import Transmission

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from threading import Semaphore

    from .disk import Disk
    from .memory import Share
    from .polling import Polling
    from .tls import TlsStream

__all__ = ["Connection", "Settings"]

_RECEIVE: Final = 1 << 16
_TICK: Final = struct.pack("@ll", 5, 0)
"""Seconds and microseconds after which a thread that receives looks whether it was asked to stop, or too slow."""
_SEND_BUFFER: Final = 1 << 20
_GONE: Final = 0
"""No event but those that need not be asked for: both halves of the connection have ended, or it broke."""


class Settings(NamedTuple):
    """How a server treats its clients.

    :ivar tls: for the handshake of TLS; ``None`` where there is none
    :ivar tls_required: nothing but TLS is accepted before TLS
    :ivar authorize: whether the holder of a certificate with this distinguished name may go on; ``None`` for everybody
    :ivar handshake_seconds: for the whole handshake; 0 for any time
    :ivar poll_nanoseconds: how long a thread looks for the next request of a busy client before it goes to sleep; for
        processes that do little else, see :mod:`byre.nbd.polling`
    """

    tls: ssl.SSLContext | None = None
    tls_required: bool = True
    authorize: Callable[[str], bool] | None = None
    handshake_seconds: float = 10.0
    poll_nanoseconds: int = 0

    @property
    def tls_mode(self) -> int:
        if self.tls is None:
            return TLS_UNAVAILABLE
        return TLS_REQUIRED if self.tls_required else TLS_OPTIONAL


class Host:
    """What a connection asks of the server it belongs to; see :class:`byre.nbd.server.Server`."""

    settings: Settings
    polling: Polling
    walks: Semaphore

    def disks(self) -> Sequence[Disk]:
        """The exports, in the order in which they are listed."""
        raise NotImplementedError

    def claim(self, disk: Disk) -> str:
        """Take a place at an export; why there is none, or ""."""
        raise NotImplementedError

    def release(self, disk: Disk) -> None:
        """Give the place back."""
        raise NotImplementedError

    def share(self, interrupt: Callable[[], None]) -> Share:
        """A client's part of the memory for buffers.

        :param interrupt: ends what the client sends
        """
        raise NotImplementedError


class Connection:
    """One client. :meth:`run` is its thread; the other methods are for whoever stops the server.

    :ivar socket: closed when :meth:`run` returns
    :ivar negotiated: the handshake was completed
    :ivar peer: who it is, for messages
    """

    def __init__(self, sock: socket.socket, host: Host, peer: str) -> None:
        self.socket = sock
        self.peer = peer
        self.negotiated = False
        self._host = host
        self._disk: Disk | None = None
        self._stream: TlsStream | None = None
        self._transmission: Transmission | None = None
        self._stopping = False

    # -- the client's thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve the client until it leaves or breaks the protocol.

        :raises ByreError: what it did wrong
        """
        try:
            self._prepare()
            agreement = self._negotiate()
            if agreement is not None:
                self.negotiated = True
                self._transmit(agreement)
        except OSError:
            pass  # the connection broke: that is for the client to know
        finally:
            if self._stream is not None:
                self._stream.end()
            self.socket.close()
            if self._disk is not None:
                self._host.release(self._disk)

    def _prepare(self) -> None:
        sock = self.socket
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def _negotiate(self) -> Agreement | None:
        """The agreement, ``None`` if the client left.

        :raises ProtocolError: it broke the protocol, or took too long
        """
        settings = self._host.settings
        deadline = monotonic() + settings.handshake_seconds if settings.handshake_seconds else None
        negotiation = Negotiation(self, settings.tls_mode)
        try:
            self._send(negotiation.take(), deadline)
            while True:
                event = negotiation.step()
                self._send(negotiation.take(), deadline)
                if isinstance(event, Agreement):
                    return event
                if isinstance(event, ClientLeft):
                    return None
                if isinstance(event, StartTls):
                    self._start_tls(deadline)
                    negotiation.tls_started()
                elif not event:
                    data = self._receive(deadline)
                    if not data:
                        return None
                    negotiation.feed(data)
        except TimeoutError:
            raise ProtocolError(f"no agreement after {settings.handshake_seconds:g} seconds") from None

    def _limit(self, deadline: float | None) -> None:
        """:raises TimeoutError: the time is over"""
        if deadline is None:
            self.socket.settimeout(None)
            return
        left = deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)

    def _send(self, data: bytes, deadline: float | None) -> None:
        if data:
            self._limit(deadline)
            if self._stream is not None:
                self._stream.send_all((data,))
            else:
                self.socket.sendall(data)

    def _receive(self, deadline: float | None) -> bytes | memoryview:
        self._limit(deadline)
        if self._stream is None:
            return self.socket.recv(_RECEIVE)
        buffer = memoryview(bytearray(_RECEIVE))
        return buffer[: self._stream.recv_into(buffer)]

    def _start_tls(self, deadline: float | None) -> None:
        from .tls import TlsStream

        settings = self._host.settings
        assert settings.tls is not None
        self._limit(deadline)
        stream = TlsStream(self.socket, settings.tls, server_side=True)
        stream.handshake(deadline)
        if settings.authorize is not None:
            name = stream.peer_name
            if not name or not settings.authorize(name):
                raise AccessDenied(f"TLS x509 authz check for {printable(name)} is denied")
        self._stream = stream

    def _transmit(self, agreement: Agreement) -> None:
        assert self._disk is not None
        sock = self.socket
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
        link: Link = PlainLink(sock) if self._stream is None else TlsLink(self._stream)
        share = self._host.share(lambda: _shut_down(sock, socket.SHUT_RD))
        self._transmission = Transmission(
            link, self._disk, agreement, share, walks=self._host.walks, has_gone=partial(_polls, sock, _GONE),
            name=f"nbd {self.peer}", polling=self._host.polling,
        )  # fmt: skip
        if self._stopping:
            return
        self._transmission.run()

    # -- what the handshake asks ------------------------------------------------------------------

    def all(self) -> list[Offer]:
        return [disk.offer for disk in self._host.disks()]

    def find(self, name: str) -> Offer | None:
        disk = self._find(name)
        return disk.offer if disk is not None else None

    def _find(self, name: str) -> Disk | None:
        return next((disk for disk in self._host.disks() if disk.offer.name == name), None)

    def claim(self, name: str) -> str:
        disk = self._find(name)
        if disk is None:
            return f"export '{name}' not present"
        refusal = self._host.claim(disk)
        if not refusal:
            self._disk = disk
        return refusal

    def uses(self, disk: Disk) -> bool:
        """Whether the client has chosen this export."""
        return self._disk is disk

    # -- for whoever stops the server -------------------------------------------------------------

    def has_left(self) -> bool:
        """Whether the client has closed its end already, though its thread may not know yet."""
        return _polls(self.socket, select.POLLRDHUP)

    def stop(self) -> None:
        """Take no more requests; those under way are answered."""
        self._stopping = True
        if self._transmission is not None:
            self._transmission.stop()
        _shut_down(self.socket, socket.SHUT_RD)

    def break_off(self) -> None:
        """Nor wait for a client that does not take its answers."""
        _shut_down(self.socket, socket.SHUT_RDWR)


def _polls(sock: socket.socket, events: int) -> bool:
    """Whether any of these events is there; a socket that is closed has them all."""
    poll = select.poll()
    try:
        poll.register(sock, events)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True


def _shut_down(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        pass  # it is closed already
