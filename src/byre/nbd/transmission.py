"""The transmission phase of one connection: requests in batches, answers in batches.

The thread that receives takes as many requests as the socket holds, answers those whose bytes are in memory at once,
gives the others to a few workers, and sends the answers of a batch together. A request that comes alone is carried
out where it was received, for handing it over would cost more than it takes. Only headers are parsed; the bytes of a
write are written from where they were received.

Limits are those of docs/reliability.md: 16 requests and 64 MiB of buffers under way for each client, 32 MiB for one
request, 30 s for a request that was begun.
"""

from __future__ import annotations

import errno
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING, Final

from ..errors import ByreError, ProtocolError
from . import checks, wire
from .answers import Answers, Task
from .direct import DIRECT_LIMIT, DirectReads
from .memory import Arena
from .polling import Polling, Receiver
from .reads import PIECE, SMALL_READ
from .replies import replies_for
from .wire import Request
from .workers import Flight, Workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Semaphore

    from .disk import Disk
    from .link import Link
    from .memory import Reception, Share
    from .server_negotiation import Agreement

__all__ = ["PAYLOAD_SECONDS", "Transmission"]

PAYLOAD_SECONDS: Final = 30.0
"""How long a request may be on its way."""

IN_SIZE: Final = 288 << 10
"""The input buffer: a write of 256 KiB, and some headers."""
OUT_SIZE: Final = 512 << 10
SEND_AT: Final = 64 << 10
"""So many bytes of answers are sent although more could be added: the client works on them meanwhile."""
PAYLOAD_PIECE: Final = 128 << 10
"""Long payloads are received in pieces of this size, which show that they move."""

MAX_REQUESTS: Final = 16
"""Requests under way for one client, apart from the one that is just being received."""
WORKERS: Final = 4

_DONE, _OTHER, _AGAIN = range(3)
"""What to do with the requests that are left of a batch: wait for the rest, look closely at the next, go on."""


class Transmission:
    """One client's transmission phase, from the agreement to the end.

    The receiving thread owns everything but the link, the disk, the share and the workers, which are for all threads.

    :param share: of the memory that clients may occupy
    :param polling: how to wait for requests; left out: asleep
    :param walks: shared by all clients of a server, see :class:`.answers.Answers`
    :param has_gone: whether the client takes no more answers, as far as the system knows
    """

    def __init__(self, link: Link, disk: Disk, agreement: Agreement, share: Share, *, walks: Semaphore,
                 has_gone: Callable[[], bool], name: str = "nbd", polling: Polling | None = None) -> None:  # fmt: skip
        self._receiver = Receiver(link, polling or Polling())
        self._link = link
        self._disk = disk
        self._share = share
        self._contexts = agreement.contexts
        self._size = agreement.offer.size
        self._replies = replies_for(agreement.structured, agreement.extended)
        self._flight = Flight(MAX_REQUESTS)
        self._answers = Answers(link, disk, self._replies, share, agreement.contexts, self._size, walks, has_gone)
        # Nothing below knows this object: its buffers are free as soon as it is, without a search for cycles.
        self._workers: Workers[Task, Arena] = Workers(
            self._answers.carry_out_apart, lambda: Arena(PIECE), self._flight, name, WORKERS
        )
        self._direct = self._make_direct(name)
        self._input = Arena(IN_SIZE)
        self._output = Arena(OUT_SIZE)
        self._rest = agreement.rest
        self._leaving = False
        self._idle = False
        #: A longer read may go from a file to the socket; else it is answered from the batch's buffer as well.
        self._quick_read = SMALL_READ if link.can_send_files and disk.in_file() else PIECE
        self._writes_wait = False
        #: The end of an answer, which goes with the next one.
        self._owed = b""
        #: Bytes that the request at the front of the input needs; 0 if that is not known yet.
        self._needed = 0
        self.stopping = False

    def _make_direct(self, name: str) -> DirectReads | None:
        """For disks that are read past the page cache, where the system allows it."""
        if not self._disk.past_cache():
            return None
        try:
            return DirectReads(self._link, self._disk, self._replies, MAX_REQUESTS, self._answers.read_apart, name)
        except OSError:
            return None

    # -- receiving --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the client leaves; what it asked for before is answered.

        :raises ProtocolError: the client broke the protocol, or was too slow
        :raises OSError: the connection broke
        """
        try:
            self._serve()
        finally:
            self._receiver.end()
            self._send_direct()
            self._workers.close()
            while not (self._flight.wait(1.0) and self._wait_direct(1.0)) and not self.stopping:
                pass
            if self._direct is not None and not self._direct.pending:
                self._direct.close()

    def _wait_direct(self, timeout: float, most: int = 0) -> bool:
        return self._direct is None or self._direct.wait(timeout, most)

    def stop(self) -> None:
        """Begin no more requests; another thread calls this. Those that nobody has begun are dropped."""
        self.stopping = self._answers.stopping = True
        for task in self._workers.drop():
            self._answers.let_go(task)
        if self._direct is not None:
            self._direct.drop()

    def _serve(self) -> None:
        view = self._input.view
        receive, flight, direct = self._receiver.receive, self._flight, self._direct
        start, end = 0, len(self._rest)
        if end > len(view):
            raise ProtocolError("too much was sent ahead")
        view[:end] = self._rest
        self._rest = b""
        while True:
            if end > start:
                start = self._take(start, end)
            if self._leaving or self.stopping:
                return
            if start < end:
                end = self._receive_rest(start, end)
                start = 0
                if end < 0:
                    return
                continue
            start = 0
            try:
                end = receive(view, busy=bool(flight.pending or (direct is not None and direct.pending)))
            except BlockingIOError:
                end = 0
                self._shrink()
                continue
            self._idle = False
            if end == 0:
                return

    def _receive_rest(self, start: int, end: int) -> int:
        """Receive more of the request that begins at ``start``, and move it to the front; where the input ends then.

        -1 if the client left in the middle.
        """
        view = self._input.view
        have = end - start
        head = self._replies.request.size
        if self._needed > len(view):
            if not self._receive_long(start, end):
                return -1
            return 0
        if start:
            view[:have] = bytes(view[start:end])
        target = self._needed or head
        return target if self._fill(view[have:target]) else -1

    def _fill(self, view: memoryview, deadline: float = 0) -> bool:
        """Receive all of ``view``; False if the client left.

        :param deadline: ``monotonic()`` time; 0 for the time that a request may take
        :raises ProtocolError: it took too long
        """
        receive = self._receiver.receive_rest
        deadline = deadline or monotonic() + PAYLOAD_SECONDS
        while view:
            try:
                count = receive(view)
            except BlockingIOError:
                count = -1
            if count == 0 or self.stopping:
                return False
            if count > 0:
                view = view[count:]
            if view and monotonic() > deadline:
                raise ProtocolError(f"a request was not complete after {PAYLOAD_SECONDS:.0f} seconds")
        return True

    def _receive_long(self, start: int, end: int) -> bool:
        """Receive a request whose payload does not fit into the input, and carry it out; False if the client left."""
        head = self._replies.request.size
        request = wire.decode_request(self._input.view[start : start + head], self._replies.extended)
        share, length = self._share, request.length
        have = end - start - head
        reception = share.receive(length)
        arena = share.budget.arena(length)
        kept = False
        try:
            payload = arena.view[:length]
            payload[:have] = self._input.view[start + head : end]
            if not self._fill_long(payload[have:], reception):
                return False
            kept = self._dispatch(request, payload, alone=True, arena=arena)
        finally:
            reception.end()
            if not kept:
                share.give_back(length)
                share.budget.keep(arena)
        return True

    def _fill_long(self, view: memoryview, reception: Reception) -> bool:
        """:meth:`_fill` for a payload that occupies memory which others may need.

        :raises ProtocolError: they did, and it had stopped coming
        """
        deadline = monotonic() + PAYLOAD_SECONDS
        whole = True
        for start in range(0, len(view), PAYLOAD_PIECE):
            whole = self._fill(view[start : start + PAYLOAD_PIECE], deadline)
            if not whole:
                break
            reception.moved_at = monotonic()
        if not reception.end():
            raise ProtocolError(f"{len(view)} bytes of a write stopped coming while others needed the memory")
        return whole

    def _shrink(self) -> None:
        """Nothing came for a while: give memory back."""
        if not self._idle:
            self._idle = True
            self._share.budget.drop_kept()
            self._input.shrink()
            self._output.shrink()

    # -- a batch ----------------------------------------------------------------------------------

    def _take(self, at: int, end: int) -> int:
        """Answer the whole requests in ``[at, end)`` of the input; where the first one that is not whole begins."""
        self._needed = 0
        while not (self._leaving or self.stopping):
            at, state = self._take_quick(at, end)
            if state == _DONE:
                break
            if state == _OTHER:
                before, at = at, self._take_other(at, end)
                if at == before:
                    break
        self._send_owed()
        self._send_direct()
        return at

    def _send_direct(self) -> None:
        """Begin the direct reads that were taken."""
        if self._direct is not None:
            self._direct.submit()

    def _send_owed(self) -> None:
        if self._owed:
            owed, self._owed = self._owed, b""
            self._link.send((owed,))

    def _take_quick(self, at: int, end: int) -> tuple[int, int]:
        """Answer requests as long as that takes no waiting; where the next one begins, and what to do with it."""
        replies, disk = self._replies, self._disk
        source, out = self._input.view, self._output.view
        unpack, magic, head = replies.request.unpack_from, replies.request_magic, replies.request.size
        put_data_head, data_head = replies.put_data_head, replies.data_head
        put_done, done_size = replies.put_done, replies.done_size
        quick_read = self._quick_read
        filled = reads = bytes_read = writes = bytes_written = 0
        state = _DONE
        failed: tuple[Request, ByreError] | None = None
        started = perf_counter_ns()
        size, read_cached, write = disk.begin()
        self._writes_wait = write is None
        if self._size < size:
            size = self._size
        try:
            while end - at >= head:
                found, flags, command, cookie, offset, length = unpack(source, at)
                if (
                    command == 0
                    and not flags
                    and found == magic
                    and 0 < length <= quick_read
                    and offset + length <= size
                ):
                    start = filled + data_head
                    stop = start + length
                    if filled > SEND_AT or stop > OUT_SIZE:
                        state = _AGAIN
                        break
                    try:
                        cached = read_cached(offset, out[start:stop])
                    except ByreError:
                        cached = False  # it will fail once more where it can be answered
                    if cached:
                        put_data_head(out, filled, cookie, offset, length)
                        filled = stop
                        reads += 1
                        bytes_read += length
                        at += head
                        continue
                elif (
                    command == 1
                    and not flags & ~wire.CMD_FLAG_PAYLOAD_LEN
                    and write is not None
                    and found == magic
                    and offset + length <= size
                    and end - at - head >= length
                ):
                    if filled + done_size > OUT_SIZE:
                        state = _AGAIN
                        break
                    try:
                        write(offset, source[at + head : at + head + length])
                    except Exception as error:
                        failed = Request(command, flags, cookie, offset, length), checks.as_failure(error)
                        at += head + length
                        state = _AGAIN
                        break
                    put_done(out, filled, cookie, offset)
                    filled += done_size
                    writes += 1
                    bytes_written += length
                    at += head + length
                    continue
                state = _OTHER
                break
        finally:
            disk.end(reads, bytes_read, writes, bytes_written, started)
        if filled:
            self._link.send((self._owed, out[:filled]) if self._owed else (out[:filled],))
            self._owed = b""
        if failed is not None:
            self._answers.fail(*failed)
        return at, state

    def _take_other(self, at: int, end: int) -> int:
        """The request at ``at``, of whatever kind; where the next begins, ``at`` if it is not whole."""
        replies = self._replies
        head = replies.request.size
        if end - at < head:
            return at
        request = wire.decode_request(self._input.view[at : at + head], replies.extended)
        payload_length = checks.payload_length(request, replies.extended)
        if payload_length > wire.MAX_PAYLOAD:
            # Not even to be thrown away is it received.
            text = f"{payload_length} bytes behind a request, allowed are {wire.MAX_PAYLOAD}"
            self._answers.fail(request, ByreError(text, errno=errno.EINVAL))
            raise ProtocolError(text)
        if end - at - head < payload_length:
            self._needed = head + payload_length
            return at
        self._needed = 0
        payload = self._input.view[at + head : at + head + payload_length] if payload_length else None
        at += head + payload_length
        self._dispatch(request, payload, alone=at == end)
        return at

    def _dispatch(
        self, request: Request, payload: memoryview | None, *, alone: bool, arena: Arena | None = None
    ) -> bool:
        """Check a request and carry it out, here or elsewhere.

        :param payload: the caller's again when this returns, unless it is kept
        :param alone: nothing else was received with it
        :param arena: what the payload lies in, if it may be kept
        :returns: whether it is kept, with its part of the share
        """
        if request.command == wire.CMD_DISC:
            self._leaving = True
            return False
        replies = self._replies
        try:
            checks.check(request, size=self._size, writable=self._disk.writable, structured=replies.structured,
                           extended=replies.extended, contexts=len(self._contexts))  # fmt: skip
        except ByreError as error:
            self._answers.fail(request, error)
            return False
        if self._is_here(request, alone):
            self._carry_out_here(Task(request, payload))
            return False
        if self._direct is not None and self._is_direct(request) and self._direct.take(request):
            return False
        self._send_direct()
        self._wait_direct(PAYLOAD_SECONDS, MAX_REQUESTS - WORKERS)
        if arena is not None:
            self._workers.submit(Task(request, payload, request.length, arena))
            return True
        if payload is None:
            self._workers.submit(Task(request))
        elif self._share.try_take(len(payload)):
            self._workers.submit(Task(request, memoryview(bytes(payload)), len(payload)))
        else:
            self._carry_out_here(Task(request, payload))  # memory is short, and this takes none
        return False

    def _carry_out_here(self, task: Task) -> None:
        """In the receiving thread."""
        self._send_direct()
        if task.request.command != wire.CMD_READ:
            self._send_owed()
        self._owed = self._answers.carry_out(task, self._output.view, self._owed)

    def _is_here(self, request: Request, alone: bool) -> bool:
        """Whether the receiving thread carries a request out itself."""
        command, flags = request.command, request.flags
        if command == wire.CMD_FLUSH or flags & wire.CMD_FLAG_FUA:
            return False  # waits for the disk, and others need not wait for that
        if command == wire.CMD_WRITE and not self._writes_wait:
            return True
        if command == wire.CMD_READ and self._seems_cached(request):
            return True
        return alone and not self._flight.pending and (self._direct is None or not self._direct.pending)

    @staticmethod
    def _is_direct(request: Request) -> bool:
        return request.command == wire.CMD_READ and not request.flags and 0 < request.length <= DIRECT_LIMIT

    def _seems_cached(self, request: Request) -> bool:
        """Whether the ends of a long read are in memory: a guess, which costs two small reads."""
        if request.length <= SMALL_READ:
            return False
        probe = self._output.view[:1]
        batch = self._disk.begin()
        try:
            return all(batch.read_cached(at, probe) for at in (request.offset, request.offset + request.length - 1))
        except ByreError:
            return False
        finally:
            self._disk.end(0, 0, 0, 0, 0)
