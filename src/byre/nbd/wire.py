"""The codec of NBD's transmission phase: magic numbers, flags, errors, and the headers as records. No sockets.

That of the handshake is :mod:`.handshake`; what both need is here. Follows the NBD protocol document (``doc/proto.md``
of the reference implementation); all integers are big-endian. Payloads of reads and writes never pass through here:
they go between the socket and the caller's buffer.
"""

from __future__ import annotations

import errno
import struct

from ..errors import ProtocolError
from ..typing import Final, NamedTuple

__all__ = [
    "Chunk",
    "ErrorPayload",
    "Hole",
    "Request",
    "SimpleReply",
    "decode_block_status",
    "decode_chunk",
    "decode_error_payload",
    "decode_hole",
    "decode_request",
    "decode_simple_reply",
    "encode_block_status",
    "encode_chunk",
    "encode_error_payload",
    "encode_hole",
    "encode_request",
    "encode_simple_reply",
    "from_wire_error",
    "sized",
    "to_wire_error",
]

# -- magic numbers --------------------------------------------------------------------------------

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
EXTENDED_CHUNK_MAGIC: Final = 0x6E8A278C

# -- transmission ---------------------------------------------------------------------------------

TRANSMISSION_HAS_FLAGS: Final = 1
TRANSMISSION_READ_ONLY: Final = 2
TRANSMISSION_FLUSH: Final = 4
TRANSMISSION_FUA: Final = 8
TRANSMISSION_ROTATIONAL: Final = 16
TRANSMISSION_TRIM: Final = 32
TRANSMISSION_WRITE_ZEROES: Final = 64
TRANSMISSION_DF: Final = 128
TRANSMISSION_MULTI_CONN: Final = 256
TRANSMISSION_RESIZE: Final = 512
TRANSMISSION_CACHE: Final = 1024
TRANSMISSION_FAST_ZERO: Final = 2048
TRANSMISSION_BLOCK_STATUS_PAYLOAD: Final = 4096

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7
CMD_RESIZE: Final = 8

CMD_FLAG_FUA: Final = 1
CMD_FLAG_NO_HOLE: Final = 2
CMD_FLAG_DF: Final = 4
CMD_FLAG_REQ_ONE: Final = 8
CMD_FLAG_FAST_ZERO: Final = 16
CMD_FLAG_PAYLOAD_LEN: Final = 32

CHUNK_FLAG_DONE: Final = 1
CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_BLOCK_STATUS_EXT: Final = 6
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_ERROR_BIT | 1
CHUNK_ERROR_OFFSET: Final = CHUNK_ERROR_BIT | 2

# Flags of base:allocation.
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
# Flag of qemu:dirty-bitmap:NAME.
STATE_DIRTY: Final = 1

MAX_STRING: Final = 4096
MAX_PAYLOAD: Final = 32 * 1024 * 1024
"""Longest payload of one request or chunk, bytes; also what block size information announces as the maximum."""

DEFAULT_PORT: Final = 10809

# -- errors ---------------------------------------------------------------------------------------

_WIRE_ERRORS: Final = {
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.ESHUTDOWN: 108,
    # What the protocol has no number for is said with the nearest one.
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
}
_LOCAL_ERRORS: Final = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.ENOTSUP,
    108: errno.ESHUTDOWN,
}


def to_wire_error(number: int) -> int:
    """The protocol's number for this system's errno value; EIO for those it does not know."""
    return _WIRE_ERRORS.get(number, 5)


def from_wire_error(number: int) -> int:
    """This system's errno value for the protocol's number; EINVAL for those it does not define."""
    return _LOCAL_ERRORS.get(number, errno.EINVAL)


# -- transmission headers -------------------------------------------------------------------------

REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")


class Request(NamedTuple):
    """A request's header, compact (28 bytes) or extended (32).

    :ivar cookie: chosen by the client, unique among its requests in flight
    :ivar length: of the effect in bytes; with ``CMD_FLAG_PAYLOAD_LEN`` and for writes, of the payload that follows
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


def encode_request(request: Request, extended: bool) -> bytes:
    layout, magic = (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
    return layout.pack(magic, request.flags, request.command, request.cookie, request.offset, request.length)


def decode_request(data: bytes | memoryview, extended: bool) -> Request:
    """:param data: 28 bytes, 32 where headers are extended

    :raises ProtocolError: wrong magic or length
    """
    layout, expected = (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
    magic, flags, command, cookie, offset, length = layout.unpack(sized(data, layout.size, "request"))
    if magic != expected:
        raise ProtocolError(f"a request begins with {magic:#x} instead of {expected:#x}")
    return Request(command, flags, cookie, offset, length)


class SimpleReply(NamedTuple):
    """:ivar error: the protocol's number, 0 for success"""

    error: int
    cookie: int


def encode_simple_reply(reply: SimpleReply) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, reply.error, reply.cookie)


def decode_simple_reply(data: bytes | memoryview) -> SimpleReply:
    """:param data: 16 bytes

    :raises ProtocolError: wrong magic or length
    """
    magic, error, cookie = SIMPLE_REPLY.unpack(sized(data, SIMPLE_REPLY.size, "reply"))
    if magic != SIMPLE_REPLY_MAGIC:
        raise ProtocolError(f"a reply begins with {magic:#x} instead of {SIMPLE_REPLY_MAGIC:#x}")
    return SimpleReply(error, cookie)


class Chunk(NamedTuple):
    """One chunk of a structured reply (header 20 bytes) or of an extended one (32); ``length`` bytes of payload follow.

    :ivar offset: the request's, in extended chunks only
    """

    flags: int
    kind: int
    cookie: int
    length: int
    offset: int = 0

    @property
    def done(self) -> bool:
        """No further chunk belongs to this request."""
        return bool(self.flags & CHUNK_FLAG_DONE)

    @property
    def is_error(self) -> bool:
        return bool(self.kind & CHUNK_ERROR_BIT)


def encode_chunk(chunk: Chunk, extended: bool) -> bytes:
    """The header alone."""
    if extended:
        return EXTENDED_CHUNK.pack(
            EXTENDED_CHUNK_MAGIC, chunk.flags, chunk.kind, chunk.cookie, chunk.offset, chunk.length
        )
    return CHUNK.pack(CHUNK_MAGIC, chunk.flags, chunk.kind, chunk.cookie, chunk.length)


def decode_chunk(data: bytes | memoryview, extended: bool) -> Chunk:
    """:param data: 20 bytes, 32 where headers are extended

    :raises ProtocolError: wrong magic or length
    """
    if extended:
        values = EXTENDED_CHUNK.unpack(sized(data, EXTENDED_CHUNK.size, "chunk"))
        magic, flags, kind, cookie, offset, length = values
        expected = EXTENDED_CHUNK_MAGIC
    else:
        magic, flags, kind, cookie, length = CHUNK.unpack(sized(data, CHUNK.size, "chunk"))
        offset, expected = 0, CHUNK_MAGIC
    if magic != expected:
        raise ProtocolError(f"a chunk begins with {magic:#x} instead of {expected:#x}")
    return Chunk(flags, kind, cookie, length, offset)


class Hole(NamedTuple):
    """Payload of ``CHUNK_OFFSET_HOLE``: these bytes read as zeroes."""

    offset: int
    length: int


def encode_hole(hole: Hole) -> bytes:
    return _HOLE.pack(hole.offset, hole.length)


def decode_hole(data: bytes | memoryview) -> Hole:
    """:raises ProtocolError: wrong length"""
    return Hole(*_HOLE.unpack(sized(data, _HOLE.size, "hole")))


class ErrorPayload(NamedTuple):
    """Payload of the error chunks.

    :ivar error: the protocol's number
    :ivar offset: where it happened, -1 where the chunk does not say
    """

    error: int
    message: str
    offset: int = -1


def encode_error_payload(payload: ErrorPayload) -> bytes:
    """With the offset if there is one; the message is cut to 4096 bytes."""
    message = payload.message.encode(errors="replace")[:MAX_STRING]
    head = _ERROR.pack(payload.error, len(message)) + message
    return head if payload.offset < 0 else head + payload.offset.to_bytes(8, "big")


def decode_error_payload(data: bytes | memoryview, kind: int) -> ErrorPayload:
    """:param kind: of the chunk

    :raises ProtocolError: the message does not fit, or there is no error number
    """
    raw = bytes(data)
    if len(raw) < _ERROR.size:
        raise ProtocolError(f"an error chunk of {len(raw)} bytes is too short")
    error, length = _ERROR.unpack_from(raw)
    rest = raw[_ERROR.size + length :]
    if error == 0 or length > MAX_STRING or _ERROR.size + length > len(raw):
        raise ProtocolError(f"an error chunk with error {error} and a message of {length} bytes")
    if kind == CHUNK_ERROR_OFFSET and len(rest) != 8:
        raise ProtocolError(f"an error chunk with {len(rest)} bytes of offset")
    message = raw[_ERROR.size : _ERROR.size + length].decode(errors="replace")
    return ErrorPayload(error, message, int.from_bytes(rest, "big") if kind == CHUNK_ERROR_OFFSET else -1)


_STATUS_HEAD = struct.Struct(">I")
_STATUS_HEAD_EXT = struct.Struct(">II")


def encode_block_status(context_id: int, extents: list[tuple[int, int]], extended: bool) -> bytes:
    """:param extents: (length in bytes, status flags), in order from the request's offset"""
    flat = [number for pair in extents for number in pair]
    if extended:
        return _STATUS_HEAD_EXT.pack(context_id, len(extents)) + struct.pack(f">{len(flat)}Q", *flat)
    return _STATUS_HEAD.pack(context_id) + struct.pack(f">{len(flat)}I", *flat)


def decode_block_status(data: bytes | memoryview, extended: bool) -> tuple[int, list[tuple[int, int]]]:
    """(context id, (length, flags) of the extents in order).

    :raises ProtocolError: a length that does not fit, no extent, or an empty one
    """
    raw = bytes(data)
    head, unit, code = (8, 16, "Q") if extended else (4, 8, "I")
    if len(raw) < head + unit or (len(raw) - head) % unit:
        raise ProtocolError(f"a block status of {len(raw)} bytes")
    count = (len(raw) - head) // unit
    if extended and _STATUS_HEAD_EXT.unpack_from(raw)[1] != count:
        raise ProtocolError(f"a block status that announces {_STATUS_HEAD_EXT.unpack_from(raw)[1]} extents has {count}")
    numbers = struct.unpack_from(f">{2 * count}{code}", raw, head)
    extents = list(zip(numbers[::2], numbers[1::2], strict=True))
    if any(length == 0 for length, _ in extents):
        raise ProtocolError("a block status with an empty extent")
    return int.from_bytes(raw[:4], "big"), extents


def sized(data: bytes | memoryview, length: int, what: str) -> bytes | memoryview:
    """``data``, which ``what`` is to fill.

    :raises ProtocolError: it is not ``length`` bytes long
    """
    if len(data) != length:
        raise ProtocolError(f"{what}: {len(data)} bytes instead of {length}")
    return data
