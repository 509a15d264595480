"""Carrying out one request and answering it, in whichever thread. Reads are :mod:`.reads`'."""

from __future__ import annotations

import errno
import threading
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError
from . import checks, wire
from .memory import Arena
from .reads import PIECE, ReadAnswers

if TYPE_CHECKING:
    from collections.abc import Callable

    from .disk import Disk
    from .link import Buffer, Link
    from .memory import Share
    from .replies import Replies
    from .wire import Request

__all__ = ["Answers", "Task"]

MAX_EXTENTS: Final = 1 << 12
"""In one answer to block status, over all its contexts: many clients may ask for many at once."""
MAX_CACHE: Final = 256 << 20
"""Bytes that one request to cache brings into memory; it is a hint, and no more is done about it."""
_FIRST_STEP: Final = 16 << 20
_LAST_STEP: Final = 1 << 30
"""Zeroing and trimming go in steps between these sizes (bytes): who stops the server, or wants to change the graph,
waits for one of them, not for all."""
_QUICK, _SLOW = 0.01, 0.05
"""Seconds that a step takes at most if the next may be twice as long, and at least if it is to be half as long."""

_LONG: Final = (wire.CMD_CACHE, wire.CMD_BLOCK_STATUS)


class Task(NamedTuple):
    """One request that is not answered yet, and what came with it.

    :ivar held: bytes of the client's share that the payload occupies until it is written
    :ivar arena: the buffer it lies in, if that is the server's
    """

    request: Request
    payload: memoryview | None = None
    held: int = 0
    arena: Arena | None = None


class Answers:
    """Answers the requests of one connection. Any number of threads.

    :param contexts: the metadata contexts that were negotiated
    :param size: what the client was told
    :param walks: held while the extents of a range are looked for, which takes the interpreter for long: of all
        clients of a server few do so at a time, of one client one
    :param has_gone: whether the client takes no more answers, as far as the system knows
    :ivar stopping: what takes long is broken off
    """

    def __init__(
        self,
        link: Link,
        disk: Disk,
        replies: Replies,
        share: Share,
        contexts: tuple[tuple[int, str], ...],
        size: int,
        walks: threading.Semaphore,
        has_gone: Callable[[], bool],
    ) -> None:
        self._link = link
        self._disk = disk
        self._replies = replies
        self._share = share
        self._reads = ReadAnswers(link, disk, replies, share)
        self._contexts = contexts
        self._size = size
        self._walks = walks
        self._turn = threading.Lock()
        self._has_gone = has_gone
        self._gone = False
        self.stopping = False

    def carry_out(self, task: Task, scratch: memoryview, owed: bytes = b"") -> bytes:
        """Carry out a request and send its answer.

        :param scratch: memory to read into, at least ``PIECE`` bytes
        :param owed: to be sent before
        :returns: the end of the answer, still to be sent
        :raises OSError: the connection broke
        """
        request = task.request
        try:
            if request.command == wire.CMD_READ:
                return self._reads.answer(request, scratch, owed)
            if request.command == wire.CMD_BLOCK_STATUS:
                answer: list[Buffer] = self._block_status(request, task.payload)
            else:
                try:
                    self._change(request, task.payload, scratch)
                finally:
                    self.let_go(task)  # before the answer, which the client may not take for a long time
                answer = [self._replies.done(request.cookie, request.offset)]
        except OSError:
            raise
        except Exception as error:
            self.fail(request, checks.as_failure(error))
            return b""
        self._link.send(answer)
        return b""

    def carry_out_apart(self, task: Task, scratch: Arena) -> None:
        """:meth:`carry_out` in a worker's thread. What nobody waits for is left, unless it changes something."""
        command = task.request.command
        # A read finds out for itself when it is sent, and asking the system would cost short ones time.
        unwanted = self.is_unwanted() if command in _LONG else self._gone and command == wire.CMD_READ
        if self.stopping or unwanted:
            self.let_go(task)
            return
        try:
            self._carry_out_all(task, scratch)
        except OSError:
            self._gone = True  # the receiving thread finds out as well

    def is_unwanted(self) -> bool:
        """Whether nobody waits for answers: the server stops, or the client has gone."""
        if not self._gone and self._has_gone():
            self._gone = True
        return self.stopping or self._gone

    def let_go(self, task: Task) -> None:
        """Of the memory that its payload occupies."""
        if task.held:
            self._share.give_back(task.held)
        if task.arena is not None:
            self._share.budget.keep(task.arena)

    def read_apart(self, request: Request) -> None:
        """A read that could not be done directly after all.

        :raises OSError: the connection broke
        """
        self._carry_out_all(Task(request), Arena(PIECE))

    def _carry_out_all(self, task: Task, scratch: Arena) -> None:
        owed = self.carry_out(task, scratch.view)
        if owed:
            self._link.send((owed,))

    def fail(self, request: Request, error: ByreError) -> None:
        """Answer that a request was not carried out."""
        number = wire.to_wire_error(error.errno)
        self._link.send((self._replies.error(request.cookie, request.offset, number, error.message),))

    def _change(self, request: Request, payload: memoryview | None, scratch: memoryview) -> None:
        """Requests that have no answer but success."""
        command, flags, _, offset, length = request
        fua = bool(flags & wire.CMD_FLAG_FUA)
        disk = self._disk
        if command == wire.CMD_WRITE:
            disk.write(offset, payload if payload is not None else memoryview(b""), fua)
        elif command == wire.CMD_FLUSH:
            disk.flush()
        elif command == wire.CMD_TRIM:
            self._in_steps(offset, length, disk.trim)
            if fua:
                disk.flush()
        elif command == wire.CMD_WRITE_ZEROES:
            unmap = not flags & wire.CMD_FLAG_NO_HOLE
            if flags & wire.CMD_FLAG_FAST_ZERO:  # all of it or nothing
                disk.write_zeroes(offset, length, may_unmap=unmap, fast=True)
            else:
                self._in_steps(offset, length, partial(disk.write_zeroes, may_unmap=unmap, fast=False))
            if fua:
                disk.flush()
        elif command == wire.CMD_CACHE:
            end = offset + min(length, MAX_CACHE)
            for at in range(offset, end, PIECE):
                if self.is_unwanted():
                    break
                disk.read_into(at, scratch[: min(PIECE, end - at)])

    def _in_steps(self, offset: int, length: int, action: Callable[[int, int], None]) -> None:
        """``action(offset, length)`` for a range, part by part, cut where clusters are cut as well.

        :raises ByreError: the server stops; some parts are done
        """
        end, step = offset + length, _FIRST_STEP
        while offset < end:
            if self.stopping:
                raise _stops()
            size = min(step - offset % step, end - offset)
            started = monotonic()
            action(offset, size)
            offset += size
            took = monotonic() - started
            if took < _QUICK:
                step = min(step * 2, _LAST_STEP)
            elif took > _SLOW:
                step = max(step // 2, _FIRST_STEP)

    def _block_status(self, request: Request, payload: memoryview | None) -> list[Buffer]:
        length, contexts = request.length, self._contexts
        if request.flags & wire.CMD_FLAG_PAYLOAD_LEN:
            length, contexts = checks.chosen_contexts(bytes(payload or b""), contexts)
            checks.check_range(request.command, request.offset, length, self._size)
        if request.flags & wire.CMD_FLAG_REQ_ONE:
            return self._extents(request, length, contexts, 1)
        with self._turn, self._walks:
            return self._extents(request, length, contexts, max(MAX_EXTENTS // len(contexts), 1))

    def _extents(
        self, request: Request, length: int, contexts: tuple[tuple[int, str], ...], limit: int
    ) -> list[Buffer]:
        answer: list[Buffer] = []
        for number, (identifier, name) in enumerate(contexts, 1):
            if limit > 1 and self.is_unwanted():
                raise _stops()
            extents = self._disk.status(name, request.offset, length, limit)
            last = number == len(contexts)
            answer.append(self._replies.block_status(request.cookie, request.offset, identifier, extents, last=last))
        return answer


def _stops() -> ByreError:
    return ByreError("the server stops", errno=errno.ESHUTDOWN)
