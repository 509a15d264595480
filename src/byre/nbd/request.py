"""One request of a client, and the rules its reply must keep. No sockets.

What a server says about a request is checked against the request itself: replies are never longer, no byte comes
twice, nothing lies outside the range, a reply that claims to be complete is. Whatever breaks a rule is a
:class:`ProtocolError`, after which nothing the server says can be believed.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from ..errors import ProtocolError
from ..io.buffers import zero_fill
from . import wire

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Sequence

__all__ = ["STATUS_LIMIT", "Request"]

STATUS_LIMIT: Final = 16 << 20
"""Bytes of one block status reply."""
PIECE_LIMIT: Final = 65536
"""Unconnected pieces of one read that are kept track of."""
ERROR_LIMIT: Final = 64
"""Error chunks of one reply."""


class Request:
    """A request, from before it is sent until its reply is complete. Reused when it is sent again.

    Guarded by the connection it is sent on; the reply is put together by whoever receives.

    :ivar payload: what a write sends
    :ivar buffer: what a read fills
    :ivar contexts: ids of which a block status may tell
    :ivar done: the reply is complete
    :ivar lost: the connection broke before
    :ivar error: the protocol's error number, 0 for success
    :ivar status: payloads of block status chunks by context id
    :ivar wake: held while somebody waits for the reply; released to wake him
    """

    __slots__ = (
        "_errors",
        "_pieces",
        "_reached",
        "buffer",
        "command",
        "contexts",
        "cookie",
        "done",
        "error",
        "flags",
        "length",
        "lost",
        "message",
        "offset",
        "payload",
        "status",
        "wake",
    )

    def __init__(self, command: int, offset: int, length: int, flags: int = 0, *, buffer: memoryview | None = None,
                 payload: Sequence[memoryview] = (), contexts: Sequence[int] = ()) -> None:  # fmt: skip
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.buffer = buffer
        self.payload = payload
        self.contexts = contexts
        self.reset()

    def reset(self) -> None:
        """As if it had never been sent."""
        self.cookie = -1
        self.done = self.lost = False
        self.error = 0
        self.message = ""
        self.status: dict[int, bytearray] | None = None
        self.wake: LockType | None = None
        self._reached = 0
        self._pieces: list[tuple[int, int]] | None = None
        self._errors = 0

    def describe(self) -> str:
        """For messages."""
        names = ("read", "write", "disconnect", "flush", "trim", "cache", "write zeroes", "block status")
        name = names[self.command] if self.command < len(names) else f"command {self.command}"
        return f"{name} of {self.length} bytes at {self.offset:#x}" if self.length else name

    # -- what a read receives ---------------------------------------------------------------------

    def place_for(self, offset: int, length: int) -> memoryview:
        """Where the ``length`` bytes that the server announces for ``offset`` go.

        :raises ProtocolError: they are not all part of this read, or some came before
        """
        buffer = self.buffer
        start = offset - self.offset
        if buffer is None or length <= 0 or start < 0 or start + length > self.length:
            raise ProtocolError(f"the server answers a {self.describe()} with {length} bytes at {offset:#x}")
        if start == self._reached and self._pieces is None:
            self._reached = start + length
        else:
            self._add_piece(start, start + length)
        return buffer[start : start + length]

    def hole(self, offset: int, length: int) -> None:
        """The server says that these bytes read as zeroes."""
        zero_fill(self.place_for(offset, length))

    def _add_piece(self, start: int, end: int) -> None:
        """Remember a piece that came out of order; pieces that touch are one."""
        pieces = self._pieces
        if pieces is None:
            pieces = self._pieces = [(0, self._reached)] if self._reached else []
        index = bisect_left(pieces, (start, end))
        before = pieces[index - 1] if index else (-1, -1)
        after = pieces[index] if index < len(pieces) else (self.length + 1, 0)
        if before[1] > start or after[0] < end:
            raise ProtocolError(f"the server answers a {self.describe()} with some bytes twice")
        first, last = index, index
        if before[1] == start:
            start, first = before[0], index - 1
        if after[0] == end:
            end, last = after[1], index + 1
        pieces[first:last] = [(start, end)]
        if len(pieces) > PIECE_LIMIT:
            raise ProtocolError(f"the server answers a {self.describe()} in more than {PIECE_LIMIT} pieces")

    def _is_filled(self) -> bool:
        if self._pieces is None:
            return self._reached == self.length
        return self._pieces == [(0, self.length)]

    # -- what others receive ----------------------------------------------------------------------

    def place_for_status(self, context: int, length: int, extended: bool) -> bytearray:
        """Where the payload of a block status goes, behind its id.

        :raises ProtocolError: nobody asked for it, it came before, or it has no sensible length
        """
        unit = 16 if extended else 8
        if self.command != wire.CMD_BLOCK_STATUS or context not in self.contexts:
            raise ProtocolError(f"the server answers a {self.describe()} with a status of context {context}")
        if self.status is None:
            self.status = {}
        if context in self.status or length < unit or length % unit or length > STATUS_LIMIT:
            raise ProtocolError(f"the server answers a {self.describe()} with a status of {length} bytes, or twice")
        place = self.status[context] = bytearray(length)
        return place

    def fail(self, error: int, message: str = "", offset: int = -1) -> None:
        """An error of the server's; the first one counts.

        :raises ProtocolError: it is about bytes that were not asked for, or there is no end to them
        """
        self._errors += 1
        if self._errors > ERROR_LIMIT or (offset >= 0 and not self.offset <= offset <= self.offset + self.length):
            raise ProtocolError(f"the server reports error {error} at {offset} to a {self.describe()}")
        if not self.error:
            self.error, self.message = error, message

    def finish(self) -> None:
        """The server says that the reply is complete.

        :raises ProtocolError: it is not
        """
        if not self.error:
            if self.buffer is not None and not self._is_filled():
                raise ProtocolError(f"the server leaves out part of a {self.describe()}")
            if self.command == wire.CMD_BLOCK_STATUS and not self.status:
                raise ProtocolError(f"the server answers a {self.describe()} without any")
        self.done = True
