"""A client of one export: one or several connections, made again when they break.

A request whose connection broke is sent again on another one that works, or on the next one for ``reconnect_delay``
seconds after the loss; later, or without a delay, it fails. Attempts to connect are spaced by 0.1 s, doubled up to 5 s,
whoever asks for them. While some of the connections work, requests use those, the broken ones are made again beside.
Every request says for itself what it changes, so sending one twice does no harm; what the server had acknowledged but
not flushed when it died is the server's to keep, as with any cache.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError, InvalidArgument, IOFailure, NoSpace, NotSupported, ProtocolError, printable
from . import wire
from .client import Connection, Security, negotiate
from .client_negotiation import Export, Wishes, list_all
from .request import Request
from .transport import connect
from .uri import show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .client_negotiation import Negotiated
    from .uri import Address

__all__ = ["HANDSHAKE_LIMIT", "Client", "Settings", "list_exports"]

HANDSHAKE_LIMIT: Final = 10.0
"""Seconds for connecting and for the whole handshake, TLS included."""
PATIENCE: Final = 600.0
"""Seconds a server may be silent while it owes replies."""
MAX_CONNECTIONS: Final = 16
IN_FLIGHT: Final = 16
"""Parts of one large request that are on their way at once."""

_DOWN: Final = 1 << 62
"""The load of a connection that is broken."""
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0


class Settings(NamedTuple):
    """How to reach an export, and how long to try.

    :ivar reconnect_delay: seconds after a loss during which requests wait for a new connection
    :ivar open_timeout: seconds during which opening tries again
    :ivar connections: how many to use if the server allows it
    :ivar families: "any", "ipv4" or "ipv6"
    """

    address: Address
    wishes: Wishes = Wishes()
    security: Security | None = None
    reconnect_delay: float = 0
    open_timeout: float = 0
    connections: int = 1
    handshake_limit: float = HANDSHAKE_LIMIT
    patience: float = PATIENCE
    families: str = "any"
    keep_alive: bool = False

    def connect(self, limit: float) -> Connection:
        """One attempt.

        :param limit: seconds
        :raises ByreError: it failed
        """
        deadline = monotonic() + limit
        transport = connect(self.address, deadline, families=self.families, keep_alive=self.keep_alive)
        return Connection.open(transport, self.wishes, self.security, deadline, patience=self.patience)


class _Line:
    """One connection, and the next one when it breaks.

    Guarded by ``_changed``: everything.

    :param accept: raises what is wrong with a new connection's export
    """

    def __init__(self, settings: Settings, accept: Callable[[Negotiated], None], first: Connection) -> None:
        self._settings = settings
        self._accept = accept
        self._changed = threading.Condition(threading.Lock())
        self._connection: Connection | None = first
        self._closed = False
        self._connecting = False
        self._lost_at = 0.0
        self._last_attempt = monotonic()
        self._next_attempt = 0.0
        self._pause = _FIRST_PAUSE
        self._failure: ByreError | None = None

    @property
    def load(self) -> int:
        """Requests in flight; very many for a line that is down."""
        connection = self._connection
        return connection.load if connection is not None and connection.error is None else _DOWN

    @property
    def lost_at(self) -> float:
        """When the last connection broke, on the clock of ``monotonic()``; just now if nobody has noticed yet."""
        return self._lost_at if self._connection is None else monotonic()

    def revive(self) -> None:
        """Make a broken connection again if its time has come; the caller does not wait for it."""
        with self._changed:
            self._notice_loss_locked()
            waits = self._connecting or monotonic() < self._next_attempt
            if self._connection is not None or self._closed or waits:
                return
            self._connecting = True
        try:
            threading.Thread(target=self._attempt, name="nbd reconnect", daemon=True).start()
        except RuntimeError:  # no thread can be had: later
            with self._changed:
                self._connecting = False

    def connection(self) -> Connection:
        """A connection that works, made now if there is none and its time has come.

        :raises ByreError: there is none, and waiting for one is over
        """
        while True:
            connection = self._connection
            if connection is not None and connection.error is None:
                return connection
            if self._is_my_turn():
                self._attempt()

    def _is_my_turn(self) -> bool:
        """Wait until there is a connection (False), or until this thread is the one to make it (True).

        :raises ByreError: waiting is over
        """
        with self._changed:
            self._notice_loss_locked()
            while self._connection is None:
                now = monotonic()
                left = self._lost_at + self._settings.reconnect_delay - now
                wait = self._next_attempt - now
                if self._closed:
                    raise IOFailure("the connection is closed")
                if not self._connecting and wait <= 0:
                    self._connecting = True
                    return True
                if left <= 0:
                    raise self._no_connection_locked()
                self._changed.wait(left if self._connecting else min(left, wait))
            return False

    def _notice_loss_locked(self) -> None:
        connection = self._connection
        if connection is None or connection.error is None:
            return
        self._failure = connection.error
        self._connection = None
        self._lost_at = monotonic()
        if connection.useful:
            self._pause = _FIRST_PAUSE
        # At once where requests wait for it; but a server that only takes connections gets ever fewer of them.
        waited = self._lost_at if self._settings.reconnect_delay else self._lost_at + self._pause
        self._next_attempt = max(waited, self._last_attempt + self._pause)
        connection.close()

    def _no_connection_locked(self) -> ByreError:
        return IOFailure(f"no connection to the server: {self._failure}")

    def _attempt(self) -> None:
        """Connect once; the only thread that does so meanwhile. How it went is found in the fields."""
        made: Connection | None = None
        failure: ByreError | None = None
        left = self._lost_at + self._settings.reconnect_delay - monotonic()
        limit = self._settings.handshake_limit
        try:
            made = self._settings.connect(min(limit, max(left, _FIRST_PAUSE)) if left > 0 else limit)
            self._accept(made.info)
        except ByreError as error:
            failure = error
        finally:
            with self._changed:
                self._connecting = False
                if made is not None and failure is None and not self._closed:
                    self._connection, made = made, None
                self._failure = failure or self._failure
                self._last_attempt = monotonic()
                self._next_attempt = self._last_attempt + self._pause
                self._pause = min(self._pause * 2, _LONGEST_PAUSE)
                self._changed.notify_all()
            if made is not None:
                made.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            connection, self._connection = self._connection, None
            self._changed.notify_all()
        if connection is not None:
            connection.close()


class Client:
    """An export that is open. Usable from many threads.

    :ivar info: what the first connection negotiated; later ones must not offer less
    :ivar where: what messages call it
    :raises ByreError: it cannot be opened
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.where = printable(show(settings.address, settings.wishes.export, tls=settings.wishes.tls == "require")
                               or str(settings.address))  # fmt: skip
        first = _open(settings)
        self.info = first.info
        self._lines = [_Line(settings, self._accept, first)]
        if self.info.flags & wire.TRANSMISSION_MULTI_CONN:
            self._add_lines(min(settings.connections, MAX_CONNECTIONS) - 1)

    def _add_lines(self, count: int) -> None:
        """More connections, as many as the server takes: it may allow fewer at a time."""
        for _ in range(count):
            try:
                connection = self.settings.connect(self.settings.handshake_limit)
            except ByreError:
                return
            try:
                self._accept(connection.info)
            except ByreError:
                connection.close()
                return
            self._lines.append(_Line(self.settings, self._accept, connection))

    def _accept(self, info: Negotiated) -> None:
        """:raises ProtocolError: a connection to something else than before"""
        before = self.info
        kept = info.flags & before.flags | wire.TRANSMISSION_READ_ONLY | wire.TRANSMISSION_ROTATIONAL
        lost = before.flags & ~kept | (info.flags & ~before.flags & wire.TRANSMISSION_READ_ONLY)
        if info.size != before.size or lost or info.mode != before.mode:
            raise ProtocolError(f"the server offers something else after reconnecting: {info.size} bytes, flags "
                                f"{info.flags:#x}; before: {before.size} bytes, flags {before.flags:#x}")  # fmt: skip
        if info.minimum > max(before.minimum, 1) or (info.maximum or wire.MAX_PAYLOAD) < min(
            before.maximum or wire.MAX_PAYLOAD, wire.MAX_PAYLOAD
        ):
            raise ProtocolError("the server has tighter block sizes after reconnecting")
        if info.contexts != before.contexts:
            raise ProtocolError("the server has other metadata contexts after reconnecting")

    # -- requests ---------------------------------------------------------------------------------

    def run(self, requests: Iterable[Request]) -> None:
        """Send all of them, up to 16 at a time, and wait for all replies.

        :raises ByreError: the first error, once none is in flight any more
        """
        flying: deque[tuple[Request, Connection | None]] = deque()
        failure: ByreError | None = None
        for request in requests:
            if len(flying) == IN_FLIGHT:
                failure = failure or self._settle(*flying.popleft())
            if failure is not None:
                break
            flying.append((request, self._submit(request)))
        while flying:
            error = self._settle(*flying.popleft())
            failure = failure or error
        if failure is not None:
            raise failure

    def run_one(self, request: Request) -> None:
        """:meth:`run` of a single request, with less ado."""
        failure = self._settle(request, self._submit(request))
        if failure is not None:
            raise failure

    def _submit(self, request: Request) -> Connection | None:
        """Send on the least busy connection; ``None`` if there is none at the moment."""
        try:
            connection = self._line().connection()
        except ByreError:
            return None
        return connection if connection.submit(request) else None

    def _line(self) -> _Line:
        """The least busy one that works, others are made again meanwhile; the one that was lost last if none does."""
        lines = self._lines
        if len(lines) == 1:
            return lines[0]
        loads = [line.load for line in lines]
        least = min(loads)
        if least == _DOWN:
            return max(lines, key=_lost_at)
        if _DOWN in loads:
            for line, load in zip(lines, loads, strict=True):
                if load == _DOWN:
                    line.revive()
        return lines[loads.index(least)]

    def _settle(self, request: Request, connection: Connection | None) -> ByreError | None:
        """Wait for the reply, sending again for as long as that makes sense; what became of it."""
        give_up = 0.0
        losses = 0
        while True:
            if connection is not None:
                if connection.wait(request):
                    return self._judge(request) if request.error else None
                losses += 1
                give_up = give_up or monotonic() + self.settings.reconnect_delay
                if monotonic() >= give_up and not self._another_works(losses):
                    return self._broken(request, connection.error)
            try:
                following = self._line().connection()
            except ByreError as error:
                return self._broken(request, error)
            connection = following if following.submit(request) else None

    def _another_works(self, losses: int) -> bool:
        """Whether there is a connection to try that has not had its chance with a request yet."""
        return losses < len(self._lines) and any(line.load < _DOWN for line in self._lines)

    def _broken(self, request: Request, error: ByreError | None) -> ByreError:
        return IOFailure(f"{request.describe()} failed: {error.message if error else 'no connection'}",
                         where=self.where)  # fmt: skip

    def _judge(self, request: Request) -> ByreError:
        """The server's error as one of ours."""
        number = wire.from_wire_error(request.error)
        said = f": {printable(request.message)}" if request.message else ""
        kinds: dict[int, type[ByreError]] = {
            errno.ENOSPC: NoSpace,
            errno.EINVAL: InvalidArgument,
            errno.ENOTSUP: NotSupported,
        }
        text = f"the server refuses a {request.describe()}: {os.strerror(number)}{said}"
        return kinds.get(number, IOFailure)(text, where=self.where, errno=number)

    def close(self) -> None:
        """Say goodbye. Closing twice is fine."""
        for line in self._lines:
            line.close()


def _lost_at(line: _Line) -> float:
    return line.lost_at


def _open(settings: Settings) -> Connection:
    """The first connection; tried again and again for ``open_timeout`` seconds.

    :raises ByreError: what the last attempt failed with
    """
    deadline = monotonic() + settings.open_timeout
    pause = _FIRST_PAUSE
    while True:
        left = deadline - monotonic()
        limit = min(settings.handshake_limit, left) if settings.open_timeout and left > 0 else settings.handshake_limit
        try:
            return settings.connect(limit)
        except InvalidArgument:
            raise
        except ByreError:
            left = deadline - monotonic()
            if left <= 0:
                raise
        sleep(min(pause, left))
        pause = min(pause * 2, _LONGEST_PAUSE)


def list_exports(
    address: Address,
    *,
    tls: str = "off",
    security: Security | None = None,
    handshake_limit: float = HANDSHAKE_LIMIT,
    families: str = "any",
) -> list[Export]:
    """All exports of a server with sizes, flags, block sizes and metadata contexts.

    :param tls: "off", "require" (with ``security``) or "allow"
    :raises ByreError: no connection, or the server cannot or will not list
    """
    deadline = monotonic() + handshake_limit
    transport = connect(address, deadline, families=families)
    talk = list_all(Wishes(tls=tls))
    try:
        negotiate(transport, talk, security, deadline)
    finally:
        transport.close()
    assert isinstance(talk.result, list)
    return talk.result
