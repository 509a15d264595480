"""How answers look in each of the three modes: simple replies, structured replies, extended headers.

Headers only; the bytes of a read are sent beside them. The mode is chosen once, when the handshake ends.
"""

from __future__ import annotations

import struct
from typing import Final

from . import wire

__all__ = ["ExtendedReplies", "Replies", "SimpleReplies", "StructuredReplies", "replies_for"]

_STRUCTURED_DATA: Final = struct.Struct(">IHHQIQ")
_EXTENDED_DATA: Final = struct.Struct(">IHHQQQQ")
_DONE: Final = wire.CHUNK_FLAG_DONE


class SimpleReplies:
    """A header of 16 bytes, behind which the data of a read follows; an error has a number and no words.

    :ivar request: layout of a request's header
    :ivar request_magic: its first field
    :ivar data_head: bytes before the data of a whole read
    :ivar done_size: bytes of a success without data
    """

    structured = False
    extended = False
    request: struct.Struct = wire.REQUEST
    request_magic: int = wire.REQUEST_MAGIC
    data_head: int = wire.SIMPLE_REPLY.size
    done_size: int = wire.SIMPLE_REPLY.size

    def put_data_head(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        """Write what stands before the data of a read that is answered in one piece."""
        wire.SIMPLE_REPLY.pack_into(buffer, at, wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_done(self, buffer: memoryview, at: int, cookie: int, offset: int) -> None:
        """Write the success of a request that has no data."""
        wire.SIMPLE_REPLY.pack_into(buffer, at, wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def data_chunk(self, cookie: int, request_offset: int, offset: int, length: int, *, last: bool) -> bytes:
        """What stands before data that is all of the answer (``last``) or part of it."""
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def done(self, cookie: int, offset: int) -> bytes:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, number: int, message: str) -> bytes:
        """:param number: the protocol's"""
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, number, cookie)

    def hole(self, cookie: int, request_offset: int, offset: int, length: int) -> bytes:
        raise AssertionError("simple replies have no holes")

    def error_at(self, cookie: int, request_offset: int, number: int, message: str, offset: int) -> bytes:
        raise AssertionError("simple replies cannot say where")

    def block_status(
        self, cookie: int, offset: int, context: int, extents: list[tuple[int, int]], *, last: bool
    ) -> bytes:
        raise AssertionError("simple replies have no block status")


class StructuredReplies(SimpleReplies):
    """Chunks with headers of 20 bytes; the last says that it is."""

    structured = True
    data_head = _STRUCTURED_DATA.size
    done_size = wire.CHUNK.size

    def put_data_head(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        _STRUCTURED_DATA.pack_into(
            buffer, at, wire.CHUNK_MAGIC, _DONE, wire.CHUNK_OFFSET_DATA, cookie, length + 8, offset
        )

    def put_done(self, buffer: memoryview, at: int, cookie: int, offset: int) -> None:
        wire.CHUNK.pack_into(buffer, at, wire.CHUNK_MAGIC, _DONE, wire.CHUNK_NONE, cookie, 0)

    def chunk(self, kind: int, cookie: int, offset: int, length: int, last: bool) -> bytes:
        """A chunk's header; ``offset`` is the request's."""
        return wire.CHUNK.pack(wire.CHUNK_MAGIC, _DONE if last else 0, kind, cookie, length)

    def data_chunk(self, cookie: int, request_offset: int, offset: int, length: int, *, last: bool) -> bytes:
        head = self.chunk(wire.CHUNK_OFFSET_DATA, cookie, request_offset, length + 8, last)
        return head + offset.to_bytes(8, "big")

    def done(self, cookie: int, offset: int) -> bytes:
        return self.chunk(wire.CHUNK_NONE, cookie, offset, 0, True)

    def error(self, cookie: int, offset: int, number: int, message: str) -> bytes:
        payload = wire.encode_error_payload(wire.ErrorPayload(number, message))
        return self.chunk(wire.CHUNK_ERROR, cookie, offset, len(payload), True) + payload

    def hole(self, cookie: int, request_offset: int, offset: int, length: int) -> bytes:
        payload = wire.encode_hole(wire.Hole(offset, length))
        return self.chunk(wire.CHUNK_OFFSET_HOLE, cookie, request_offset, len(payload), False) + payload

    def error_at(self, cookie: int, request_offset: int, number: int, message: str, offset: int) -> bytes:
        payload = wire.encode_error_payload(wire.ErrorPayload(number, message, offset))
        return self.chunk(wire.CHUNK_ERROR_OFFSET, cookie, request_offset, len(payload), True) + payload

    def block_status(
        self, cookie: int, offset: int, context: int, extents: list[tuple[int, int]], *, last: bool
    ) -> bytes:
        payload = wire.encode_block_status(context, extents, self.extended)
        kind = wire.CHUNK_BLOCK_STATUS_EXT if self.extended else wire.CHUNK_BLOCK_STATUS
        return self.chunk(kind, cookie, offset, len(payload), last) + payload


class ExtendedReplies(StructuredReplies):
    """Chunks with headers of 32 bytes, which repeat the request's offset; requests have 32 as well."""

    extended = True
    request = wire.EXTENDED_REQUEST
    request_magic = wire.EXTENDED_REQUEST_MAGIC
    data_head = _EXTENDED_DATA.size
    done_size = wire.EXTENDED_CHUNK.size

    def put_data_head(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        _EXTENDED_DATA.pack_into(
            buffer, at, wire.EXTENDED_CHUNK_MAGIC, _DONE, wire.CHUNK_OFFSET_DATA, cookie, offset, length + 8, offset
        )

    def put_done(self, buffer: memoryview, at: int, cookie: int, offset: int) -> None:
        wire.EXTENDED_CHUNK.pack_into(buffer, at, wire.EXTENDED_CHUNK_MAGIC, _DONE, wire.CHUNK_NONE, cookie, offset, 0)

    def chunk(self, kind: int, cookie: int, offset: int, length: int, last: bool) -> bytes:
        return wire.EXTENDED_CHUNK.pack(wire.EXTENDED_CHUNK_MAGIC, _DONE if last else 0, kind, cookie, offset, length)


Replies = SimpleReplies | StructuredReplies | ExtendedReplies


def replies_for(structured: bool, extended: bool) -> Replies:
    return ExtendedReplies() if extended else StructuredReplies() if structured else SimpleReplies()
