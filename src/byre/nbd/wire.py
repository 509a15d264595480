"""The codec of NBD: magic numbers, flags, and the headers of both phases as records. No sockets.

Follows the NBD protocol document (``doc/proto.md`` of the reference implementation); all integers are big-endian.
Payloads of reads and writes never pass through here: they go between the socket and the caller's buffer.
"""

from __future__ import annotations

import errno
import struct

from ..errors import ProtocolError
from ..typing import Final, NamedTuple

__all__ = [
    "Chunk",
    "ErrorPayload",
    "ExportInfo",
    "Hole",
    "Option",
    "OptionReply",
    "Request",
    "SimpleReply",
    "decode_block_sizes",
    "decode_block_status",
    "decode_chunk",
    "decode_error_payload",
    "decode_export_info",
    "decode_hole",
    "decode_meta_context",
    "decode_option",
    "decode_option_reply",
    "decode_request",
    "decode_server_entry",
    "decode_simple_reply",
    "encode_block_sizes",
    "encode_block_status",
    "encode_chunk",
    "encode_error_payload",
    "encode_export_info",
    "encode_hole",
    "encode_meta_context",
    "encode_option",
    "encode_option_reply",
    "encode_request",
    "encode_server_entry",
    "encode_simple_reply",
    "from_wire_error",
    "to_wire_error",
]

# -- magic numbers --------------------------------------------------------------------------------

INIT_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
EXTENDED_CHUNK_MAGIC: Final = 0x6E8A278C

# -- handshake ------------------------------------------------------------------------------------

# Flags of the server and, with the same bits, of the client.
FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_FLAG_ERROR: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_FLAG_ERROR | 1
REP_ERR_POLICY: Final = REP_FLAG_ERROR | 2
REP_ERR_INVALID: Final = REP_FLAG_ERROR | 3
REP_ERR_PLATFORM: Final = REP_FLAG_ERROR | 4
REP_ERR_TLS_REQD: Final = REP_FLAG_ERROR | 5
REP_ERR_UNKNOWN: Final = REP_FLAG_ERROR | 6
REP_ERR_SHUTDOWN: Final = REP_FLAG_ERROR | 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_FLAG_ERROR | 8
REP_ERR_TOO_BIG: Final = REP_FLAG_ERROR | 9
REP_ERR_EXT_HEADER_REQD: Final = REP_FLAG_ERROR | 10

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

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
MAX_OPTION: Final = 64 * 1024
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


# -- handshake headers ----------------------------------------------------------------------------

_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
OPTION_SIZE: Final = 16
OPTION_REPLY_SIZE: Final = 20


class Option(NamedTuple):
    """An option the client sends; ``length`` bytes of data follow."""

    option: int
    length: int


def encode_option(option: int, data: bytes = b"") -> bytes:
    """A whole option, with its data."""
    return _OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def decode_option(data: bytes) -> Option:
    """:param data: 16 bytes

    :raises ProtocolError: wrong magic
    """
    magic, option, length = _OPTION.unpack(_sized(data, OPTION_SIZE, "option"))
    if magic != OPTION_MAGIC:
        raise ProtocolError(f"an option begins with {magic!r} instead of {OPTION_MAGIC!r}")
    return Option(option, length)


class OptionReply(NamedTuple):
    """A server's answer to an option; ``length`` bytes of data follow."""

    option: int
    kind: int
    length: int


def encode_option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """A whole reply, with its data."""
    return _OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def decode_option_reply(data: bytes) -> OptionReply:
    """:param data: 20 bytes

    :raises ProtocolError: wrong magic
    """
    magic, option, kind, length = _OPTION_REPLY.unpack(_sized(data, OPTION_REPLY_SIZE, "option reply"))
    if magic != OPTION_REPLY_MAGIC:
        raise ProtocolError(f"an option reply begins with {magic:#x} instead of {OPTION_REPLY_MAGIC:#x}")
    return OptionReply(option, kind, length)


class ExportInfo(NamedTuple):
    """NBD_INFO_EXPORT: size in bytes and transmission flags."""

    size: int
    flags: int


_EXPORT_INFO = struct.Struct(">HQH")
_BLOCK_SIZES = struct.Struct(">HIII")


def encode_export_info(info: ExportInfo) -> bytes:
    return _EXPORT_INFO.pack(INFO_EXPORT, info.size, info.flags)


def decode_export_info(data: bytes) -> ExportInfo:
    """:param data: the whole payload, its type included

    :raises ProtocolError: wrong length or type
    """
    kind, size, flags = _EXPORT_INFO.unpack(_sized(data, _EXPORT_INFO.size, "export information"))
    if kind != INFO_EXPORT:
        raise ProtocolError(f"export information has type {kind}")
    return ExportInfo(size, flags)


def encode_block_sizes(minimum: int, preferred: int, maximum: int) -> bytes:
    return _BLOCK_SIZES.pack(INFO_BLOCK_SIZE, minimum, preferred, maximum)


def decode_block_sizes(data: bytes) -> tuple[int, int, int]:
    """(minimum, preferred, maximum) in bytes.

    :param data: the whole payload, its type included
    :raises ProtocolError: sizes that make no sense
    """
    kind, minimum, preferred, maximum = _BLOCK_SIZES.unpack(_sized(data, _BLOCK_SIZES.size, "block sizes"))
    if kind != INFO_BLOCK_SIZE:
        raise ProtocolError(f"block size information has type {kind}")
    if minimum == 0 or minimum > 65536 or minimum & (minimum - 1):
        raise ProtocolError(f"the minimum block size {minimum} is not a power of two up to 65536")
    if preferred & (preferred - 1) or not max(512, minimum) <= preferred <= MAX_PAYLOAD:
        raise ProtocolError(f"the preferred block size {preferred} is not a power of two between 512 and 32 MiB")
    if maximum != 0xFFFFFFFF and (maximum < preferred or maximum % minimum):
        raise ProtocolError(f"the maximum block size {maximum} does not fit the others ({minimum}, {preferred})")
    return minimum, preferred, maximum


def encode_server_entry(name: str, description: str = "") -> bytes:
    """The data of a NBD_REP_SERVER."""
    raw = name.encode()
    return struct.pack(">I", len(raw)) + raw + description.encode()


def decode_server_entry(data: bytes) -> tuple[str, str]:
    """(export name, description).

    :raises ProtocolError: the name does not end inside the data, is too long or is not UTF-8
    """
    if len(data) < 4:
        raise ProtocolError(f"an export entry of {len(data)} bytes is too short")
    (length,) = struct.unpack_from(">I", data)
    if length > MAX_STRING or 4 + length > len(data):
        raise ProtocolError(f"an export name of {length} bytes does not fit its entry of {len(data)}")
    return text(data[4 : 4 + length]), text(data[4 + length :][:MAX_STRING])


def encode_meta_context(context_id: int, name: str) -> bytes:
    """The data of a NBD_REP_META_CONTEXT."""
    return struct.pack(">I", context_id) + name.encode()


def decode_meta_context(data: bytes) -> tuple[int, str]:
    """(id, name) of a metadata context.

    :raises ProtocolError: too short, too long, or not UTF-8
    """
    if not 4 < len(data) <= 4 + MAX_STRING:
        raise ProtocolError(f"a metadata context of {len(data)} bytes")
    return int.from_bytes(data[:4], "big"), text(data[4:])


def text(data: bytes) -> str:
    """A string of the protocol.

    :raises ProtocolError: it is not UTF-8
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"the string {data[:64]!r} is not UTF-8") from None


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
    magic, flags, command, cookie, offset, length = layout.unpack(_sized(data, layout.size, "request"))
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
    magic, error, cookie = SIMPLE_REPLY.unpack(_sized(data, SIMPLE_REPLY.size, "reply"))
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
        values = EXTENDED_CHUNK.unpack(_sized(data, EXTENDED_CHUNK.size, "chunk"))
        magic, flags, kind, cookie, offset, length = values
        expected = EXTENDED_CHUNK_MAGIC
    else:
        magic, flags, kind, cookie, length = CHUNK.unpack(_sized(data, CHUNK.size, "chunk"))
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
    return Hole(*_HOLE.unpack(_sized(data, _HOLE.size, "hole")))


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


def _sized(data: bytes | memoryview, length: int, what: str) -> bytes | memoryview:
    if len(data) != length:
        raise ProtocolError(f"{what}: {len(data)} bytes instead of {length}")
    return data
