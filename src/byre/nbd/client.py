"""One connection of a client: many requests in flight from many threads.

The threads that wait for replies take turns in receiving: one of them reads replies, hands each to whom it belongs,
and passes the turn on once its own is complete. So a lone thread never waits for another, and no thread exists
that does nothing but receive. Payload goes straight into the caller's buffer. Anything the server says that breaks a
rule (:mod:`.request`) ends the connection: all its requests are lost, and :mod:`.session` decides what becomes of them.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock
from array import array
from typing import TYPE_CHECKING, Final

from ..errors import ByreError, IOFailure, ProtocolError
from . import wire
from .client_negotiation import ClientNegotiation, Negotiated, choose_export
from .transport import Disconnected, Silence

if TYPE_CHECKING:
    import ssl

    from .client_negotiation import Wishes
    from .request import Request
    from .transport import Transport

__all__ = ["Connection", "Security", "negotiate"]

READ_AHEAD: Final = 64 * 1024
STALL_LIMIT: Final = 30.0
"""Seconds without a byte in the middle of a reply."""


class Security:
    """How a client does TLS.

    :param context: makes sessions
    :param hostname: the certificate must be for this name; ``None``: the context does not ask
    """

    def __init__(self, context: ssl.SSLContext, hostname: str | None) -> None:
        self.context = context
        self.hostname = hostname


def negotiate(transport: Transport, talk: ClientNegotiation, security: Security | None, deadline: float) -> None:
    """Carry a conversation to its end.

    :param deadline: on the clock of :func:`time.monotonic`
    :raises ByreError: refused, broken, or not in time
    """
    try:
        while True:
            outgoing = talk.take_outgoing()
            if outgoing:
                transport.send((outgoing,))
            if talk.done:
                return
            if talk.wanted:
                talk.receive(transport.receive_exactly(talk.wanted, deadline))
            else:
                if security is None:
                    raise ProtocolError("TLS was agreed on, but no credentials are there")
                transport.start_tls(security.context, security.hostname, deadline)
                talk.tls_started()
    except Disconnected:
        raise talk.closed() from None


class _Input:
    """What was received and not used yet. Used by one thread at a time: whose turn it is."""

    def __init__(self, transport: Transport, stall_limit: float, patience: float) -> None:
        self._transport = transport
        self._buffer = memoryview(bytearray(READ_AHEAD))
        self._start = self._end = 0
        self._stall_limit = stall_limit
        self._patience = patience
        transport.set_limits(stall_limit, patience)

    @property
    def available(self) -> int:
        return self._end - self._start

    def peek(self, length: int, *, idle: bool = False) -> memoryview:
        """The next ``length`` bytes, which stay; valid until the next call.

        :param idle: a reply need not have begun: silence is patience's matter
        """
        if self._end - self._start < length:
            self._fill(length, idle)
        return self._buffer[self._start : self._start + length]

    def skip(self, length: int) -> None:
        self._start += length

    def take(self, length: int) -> memoryview:
        view = self.peek(length)
        self._start += length
        return view

    def _fill(self, length: int, idle: bool) -> None:
        have = self._end - self._start
        self._buffer[:have] = self._buffer[self._start : self._end]
        self._start, self._end = 0, have
        silent = 0.0
        while self._end < length:
            try:
                self._end += self._transport.receive_into(self._buffer[self._end :])
            except Silence:
                silent += self._stall_limit
                begun = not idle or self._end
                if begun or (self._patience and silent >= self._patience):
                    raise _silent(silent) from None

    def payload(self, place: memoryview) -> None:
        """Fill ``place`` with what comes next."""
        done = min(len(place), self._end - self._start)
        if done:
            place[:done] = self._buffer[self._start : self._start + done]
            self._start += done
        try:
            while done < len(place):
                done += self._transport.receive_into(place[done:], whole=True)
        except Silence:
            raise _silent(self._stall_limit) from None


def _silent(seconds: float) -> Disconnected:
    return Disconnected(f"the server has been silent for {seconds:g} seconds")


class Connection:
    """A connection in the transmission phase.

    Guarded by ``_lock`` (a leaf): requests in flight, what is to be sent, who sends, whose turn it is, ``error``.

    :ivar info: what was negotiated
    :ivar error: why it does not work any more; ``None`` while it does
    :ivar useful: a request was answered on it
    :param patience: seconds the server may be silent while it owes replies; 0: for ever
    """

    def __init__(self, transport: Transport, info: Negotiated, *, patience: float = 0,
                 stall_limit: float = STALL_LIMIT) -> None:  # fmt: skip
        self.info = info
        self.error: ByreError | None = None
        self.useful = False
        self._transport = transport
        self._lock = threading.Lock()
        self._outgoing: list[bytes | memoryview] = []
        self._sending = False
        self._flying: dict[int, Request] = {}
        self._cookie = 0
        self._turn_taken = False
        self._closing = False
        self._input = _Input(transport, min(stall_limit, patience or stall_limit), patience)
        self._extended = info.extended
        self._structured = info.structured

    @classmethod
    def open(cls, transport: Transport, wishes: Wishes, security: Security | None, deadline: float, *,
             patience: float = 0) -> Connection:  # fmt: skip
        """Negotiate; the transport is closed if that fails.

        :raises ByreError: as :func:`negotiate`
        """
        try:
            talk = choose_export(wishes)
            negotiate(transport, talk, security, deadline)
            assert isinstance(talk.result, Negotiated)
            return cls(transport, talk.result, patience=patience)
        except BaseException:
            transport.close()
            raise

    @property
    def load(self) -> int:
        """Requests in flight."""
        return len(self._flying)

    # -- sending ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> bool:
        """Send; False if the connection was broken before. If it breaks meanwhile, :meth:`wait` says so."""
        request.reset()
        layout = wire.EXTENDED_REQUEST if self._extended else wire.REQUEST
        magic = wire.EXTENDED_REQUEST_MAGIC if self._extended else wire.REQUEST_MAGIC
        flags = request.flags
        if self._extended and request.payload:
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
        with self._lock:
            if self.error is not None:
                return False
            self._cookie += 1
            cookie = request.cookie = self._cookie
            self._flying[cookie] = request
            self._outgoing.append(layout.pack(magic, flags, request.command, cookie, request.offset, request.length))
            if request.payload:
                self._outgoing += request.payload
            if self._sending:
                return True
            self._sending = True
        try:
            self._send_outgoing()
        except ByreError as error:
            self._stop_sending(error)
        except BaseException as error:
            self._stop_sending(IOFailure(f"interrupted while sending: {type(error).__name__}"))
            raise
        return True

    def _stop_sending(self, error: ByreError) -> None:
        self._break(error)
        with self._lock:
            self._sending = False
            self._let_go_locked()

    def _send_outgoing(self) -> None:
        """Send what this thread and, meanwhile, others want sent, until nothing is left."""
        while True:
            with self._lock:
                parts = self._outgoing
                if not parts:
                    self._sending = False
                    self._let_go_locked()
                    return
                self._outgoing = []
            self._transport.send(parts)

    # -- receiving --------------------------------------------------------------------------------

    def wait(self, request: Request) -> bool:
        """Until the reply to a submitted request is complete; False if the connection broke before.

        Only afterwards is its buffer the caller's again.
        """
        turn = False
        try:
            with self._lock:
                if request.done or request.lost:
                    return request.done
                if self._turn_taken:
                    wake = request.wake = allocate_lock()
                    wake.acquire()
                else:
                    turn = self._turn_taken = True
            if not turn:
                wake.acquire()
                if request.done or request.lost:
                    return request.done
                turn = True
            self._receive(request)
        except ByreError as error:
            self._abandon(error)
        except BaseException as error:
            why = IOFailure(f"interrupted while receiving: {type(error).__name__}")
            self._abandon(why) if turn else self._break(why)
            raise
        return request.done

    def _receive(self, own: Request) -> None:
        """Take replies until that to ``own`` is complete and nothing more lies ready; then pass the turn on."""
        head = wire.EXTENDED_CHUNK.size if self._extended else wire.SIMPLE_REPLY.size
        source = self._input
        while not own.done or source.available >= head:
            self._one_reply()
        with self._lock:
            for other in self._flying.values():
                if other.wake is not None:
                    other.wake.release()
                    other.wake = None
                    return
            self._turn_taken = False
            self._let_go_locked()

    def _one_reply(self) -> None:
        if not self._structured:
            self._simple()
            return
        if not self._extended:
            magic = self._input.peek(wire.SIMPLE_REPLY.size, idle=True)[:4]
            if magic == wire.SIMPLE_REPLY_MAGIC.to_bytes(4, "big"):
                self._simple()
                return
        self._chunk()

    def _simple(self) -> None:
        source = self._input
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(source.peek(16, idle=True))
        source.skip(16)
        if magic != wire.SIMPLE_REPLY_MAGIC:
            raise ProtocolError(f"a reply begins with {magic:#x} instead of {wire.SIMPLE_REPLY_MAGIC:#x}")
        request = self._find(cookie)
        if self._structured and request.command in (wire.CMD_READ, wire.CMD_BLOCK_STATUS):
            raise ProtocolError(f"a {request.describe()} is answered without structure, although that was agreed on")
        if error:
            request.fail(error)
        elif request.buffer is not None:
            source.payload(request.place_for(request.offset, request.length))
        self._complete(request)

    def _chunk(self) -> None:
        source = self._input
        size = wire.EXTENDED_CHUNK.size if self._extended else wire.CHUNK.size
        chunk = wire.decode_chunk(source.peek(size, idle=True), self._extended)
        source.skip(size)
        request = self._find(chunk.cookie)
        if self._extended and chunk.offset != request.offset:
            raise ProtocolError(f"a chunk for offset {chunk.offset:#x} answers a {request.describe()}")
        kind, length = chunk.kind, chunk.length
        if kind == wire.CHUNK_OFFSET_DATA:
            if length <= 8:
                raise ProtocolError(f"a data chunk of {length} bytes")
            offset = int.from_bytes(source.take(8), "big")
            source.payload(request.place_for(offset, length - 8))
        elif kind == wire.CHUNK_OFFSET_HOLE and length == 12:
            request.hole(*wire.decode_hole(source.take(12)))
        elif kind == wire.CHUNK_NONE and length == 0 and chunk.done:
            pass
        elif kind in (wire.CHUNK_BLOCK_STATUS, wire.CHUNK_BLOCK_STATUS_EXT):
            self._status(request, kind, length)
        elif chunk.is_error and length <= wire.MAX_STRING + 14:
            self._error(request, kind, length)
        else:
            raise ProtocolError(f"a chunk of kind {kind} and {length} bytes answers a {request.describe()}")
        if chunk.done:
            self._complete(request)

    def _status(self, request: Request, kind: int, length: int) -> None:
        extended = kind == wire.CHUNK_BLOCK_STATUS_EXT
        head = 8 if extended else 4
        if extended != self._extended or length < head:
            raise ProtocolError(f"a block status of kind {kind} and {length} bytes")
        taken = self._input.take(head)
        context, count = int.from_bytes(taken[:4], "big"), int.from_bytes(taken[4:], "big")
        if extended and count * 16 != length - 8:
            raise ProtocolError(f"a block status that announces {count} extents has {length} bytes")
        place = request.place_for_status(context, length - head, extended)
        self._input.payload(memoryview(place))
        # Lengths and flags take turns; zero is zero in any byte order.
        if 0 in array("Q" if extended else "I", place)[::2]:
            raise ProtocolError(f"the server answers a {request.describe()} with an empty extent")

    def _error(self, request: Request, kind: int, length: int) -> None:
        data = bytes(self._input.take(length))
        if kind in (wire.CHUNK_ERROR, wire.CHUNK_ERROR_OFFSET):
            found = wire.decode_error_payload(data, kind)
            request.fail(found.error, found.message, found.offset)
        else:
            request.fail(int.from_bytes(data[:4], "big") or 5)

    def _find(self, cookie: int) -> Request:
        request = self._flying.get(cookie)
        if request is None:
            raise ProtocolError(f"the server answers request {cookie}, which is not in flight")
        return request

    def _complete(self, request: Request) -> None:
        request.finish()
        self.useful = True
        with self._lock:
            self._flying.pop(request.cookie, None)
            if request.wake is not None:
                request.wake.release()
                request.wake = None

    # -- the end ----------------------------------------------------------------------------------

    def _break(self, error: ByreError) -> None:
        """No request goes out any more. Whoever has the turn, or takes it, finds the stream ended."""
        with self._lock:
            if self.error is None:
                self.error = error
        self._transport.shutdown()

    def _abandon(self, error: ByreError) -> None:
        """By whose turn it is, so that nobody puts anything into a buffer now: all requests in flight are lost."""
        self._break(error)
        with self._lock:
            for request in self._flying.values():
                request.lost = True
                if request.wake is not None:
                    request.wake.release()
                    request.wake = None
            self._flying.clear()
            self._turn_taken = False
            self._let_go_locked()

    def close(self) -> None:
        """Say goodbye and let go; what is in flight is lost. Closing twice is fine."""
        if self.error is None:
            head = wire.encode_request(wire.Request(wire.CMD_DISC, 0, self._cookie + 1, 0, 0), self._extended)
            self._transport.set_limits(1, 1)
            try:
                self._transport.send((head,))
            except ByreError:
                pass  # it is gone already
            self._break(IOFailure("the connection is closed"))
        with self._lock:
            self._closing = True
            self._let_go_locked()

    def _let_go_locked(self) -> None:
        """Close the socket once nobody uses it: its number may be that of the next connection right afterwards, from
        which a thread that is still about to receive would take what is not its own.
        """
        if self._closing and not self._turn_taken and not self._sending:
            self._transport.close()
