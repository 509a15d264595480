"""Answers to reads that were not answered with their batch: in chunks, with holes, straight from the file.

Structured answers come chunk by chunk, so that little memory is needed whatever was asked for; an error in the middle
ends them. Simple answers have one header that says whether all went well, so they are read whole before they are sent,
or, where memory is short, the connection is broken off when something fails behind the header.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from ..errors import ByreError
from . import wire
from .disk import IN_FILE, ZERO, Piece
from .memory import Arena

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .disk import Disk
    from .link import Buffer, Link
    from .memory import Share
    from .replies import Replies
    from .wire import Request

__all__ = ["PIECE", "SMALL_READ", "ReadAnswers"]

SMALL_READ: Final = 64 << 10
"""Reads up to here are answered in one chunk."""
PIECE: Final = 256 << 10
"""Longer ones are read and sent in pieces of this size."""
_PART: Final = 2
"""Answers occupy memory until clients take them, so no more than one in so many bytes is for them."""


class ReadAnswers:
    """Answers reads over one connection. Any number of threads."""

    def __init__(self, link: Link, disk: Disk, replies: Replies, share: Share) -> None:
        self._link = link
        self._disk = disk
        self._replies = replies
        self._share = share

    def answer(self, request: Request, scratch: memoryview, owed: bytes = b"") -> bytes:
        """Read and send.

        :param scratch: memory of at least ``PIECE`` bytes
        :param owed: to be sent before, also if nothing else is
        :returns: the end of the answer, still to be sent
        :raises ByreError: nothing was sent yet, or chunks that an error may follow
        :raises OSError: the connection broke
        """
        length = request.length
        if not length:  # no chunk may be empty
            return owed + self._replies.done(request.cookie, request.offset)
        small = length <= SMALL_READ or (length <= PIECE and not self._link.can_send_files)
        whole = small or (length <= PIECE and request.flags & wire.CMD_FLAG_DF)
        if not whole and self._replies.structured and not request.flags & wire.CMD_FLAG_DF:
            return self._chunks(request, scratch, owed)
        if owed:
            self._link.send((owed,))
        if whole:
            self._whole(request, scratch)
        elif self._replies.structured:
            self._unfragmented(request)
        else:
            self._simple(request, scratch)
        return b""

    def _whole(self, request: Request, memory: memoryview) -> None:
        _, _, cookie, offset, length = request
        data = memory[:length]
        self._disk.read_into(offset, data)
        self._link.send((self._replies.data_chunk(cookie, offset, offset, length, last=True), data))

    def _unfragmented(self, request: Request) -> None:
        """One chunk, however long.

        :raises ByreError: EOVERFLOW where there is no memory for it, which the protocol allows
        """
        if not self._share.try_take(request.length, part=_PART):
            raise ByreError("too many long requests are under way for an answer in one piece", errno=errno.EOVERFLOW)
        try:
            self._whole(request, Arena(request.length).view)
        finally:
            self._share.give_back(request.length)

    # -- chunks -----------------------------------------------------------------------------------

    def _chunks(self, request: Request, scratch: memoryview, owed: bytes) -> bytes:
        _, _, cookie, offset, length = request
        replies, link = self._replies, self._link
        waiting: list[Buffer] = [owed]
        pieces: list[Piece] = []
        at = offset
        try:
            pieces = self._disk.pieces(offset, length, in_file=link.can_send_files, holes=True)
            for piece in pieces:
                if piece.kind == ZERO:
                    waiting.append(replies.hole(cookie, offset, at, piece.length))
                elif piece.kind == IN_FILE:
                    head = replies.data_chunk(cookie, offset, at, piece.length, last=False)
                    failure = link.send_file(b"".join((*waiting, head)), piece.fd, piece.offset, piece.length)
                    waiting.clear()
                    if failure:
                        text = f"cannot read: {os.strerror(failure)}"
                        return replies.error_at(cookie, offset, wire.to_wire_error(failure), text, at)
                else:
                    self._read_piece(request, at, piece.length, scratch, waiting)
                at += piece.length
        except ByreError:
            if waiting:
                link.send((b"".join(waiting),))
            raise
        finally:
            _close(pieces)
        return b"".join((*waiting, replies.done(cookie, offset)))

    def _read_piece(self, request: Request, at: int, length: int, scratch: memoryview, waiting: list[Buffer]) -> None:
        """``length`` bytes from ``at``, a chunk for each buffer full; ``waiting`` goes first."""
        _, _, cookie, offset, _ = request
        end = at + length
        while at < end:
            data = scratch[: min(PIECE, end - at)]
            self._disk.read_into(at, data)
            head = self._replies.data_chunk(cookie, offset, at, len(data), last=False)
            self._link.send((b"".join((*waiting, head)), data))
            waiting.clear()
            at += len(data)

    # -- simple answers ---------------------------------------------------------------------------

    def _simple(self, request: Request, scratch: memoryview) -> None:
        _, _, cookie, offset, length = request
        pieces = self._disk.pieces(offset, length, in_file=self._link.can_send_files, holes=False)
        try:
            if len(pieces) == 1 and pieces[0].kind == IN_FILE:
                head = self._replies.data_chunk(cookie, offset, offset, length, last=True)
                failure = self._link.send_file(head, pieces[0].fd, pieces[0].offset, length)
                if failure:
                    raise ConnectionAbortedError(failure, "a read failed behind its header")
                return
        finally:
            _close(pieces)
        if length <= PIECE:
            self._whole(request, scratch)
        elif self._share.try_take(length, part=_PART):
            try:
                self._whole(request, Arena(request.length).view)
            finally:
                self._share.give_back(length)
        else:
            self._link.send_each(self._streamed(request, scratch))

    def _streamed(self, request: Request, scratch: memoryview) -> Iterator[Buffer]:
        _, _, cookie, offset, length = request
        for at in range(offset, offset + length, PIECE):
            data = scratch[: min(PIECE, offset + length - at)]
            try:
                self._disk.read_into(at, data)
            except ByreError as error:
                raise ConnectionAbortedError(error.errno, "a read failed behind its header") from error
            if at == offset:
                yield self._replies.data_chunk(cookie, offset, offset, length, last=True)
            yield data


def _close(pieces: list[Piece]) -> None:
    for fd in {piece.fd for piece in pieces if piece.fd >= 0}:
        os.close(fd)
