"""The codec of NBD's handshake: magic numbers, options, replies to them, and what these carry. No sockets.

Follows the NBD protocol document (``doc/proto.md`` of the reference implementation); all integers are big-endian.
"""

from __future__ import annotations

import struct

from ..errors import ProtocolError
from ..typing import Final, NamedTuple
from .wire import MAX_PAYLOAD, MAX_STRING, sized

__all__ = [
    "ExportInfo",
    "Option",
    "OptionReply",
    "decode_block_sizes",
    "decode_export_info",
    "decode_meta_context",
    "decode_option",
    "decode_option_reply",
    "decode_server_entry",
    "encode_block_sizes",
    "encode_export_info",
    "encode_meta_context",
    "encode_option",
    "encode_option_reply",
    "encode_server_entry",
    "text",
]

INIT_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

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

MAX_OPTION: Final = 64 * 1024

# -- options and replies --------------------------------------------------------------------------

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
    magic, option, length = _OPTION.unpack(sized(data, OPTION_SIZE, "option"))
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
    magic, option, kind, length = _OPTION_REPLY.unpack(sized(data, OPTION_REPLY_SIZE, "option reply"))
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
    kind, size, flags = _EXPORT_INFO.unpack(sized(data, _EXPORT_INFO.size, "export information"))
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
    kind, minimum, preferred, maximum = _BLOCK_SIZES.unpack(sized(data, _BLOCK_SIZES.size, "block sizes"))
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
