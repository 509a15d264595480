"""What a request must be to be carried out: commands, flags, ranges. What is not gets the protocol's error."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from ..errors import AccessDenied, ByreError, InvalidArgument, NoSpace
from . import wire

if TYPE_CHECKING:
    from .wire import Request

__all__ = ["check", "chosen_contexts", "payload_length"]

_NAMES: Final = {
    wire.CMD_READ: "read", wire.CMD_WRITE: "write", wire.CMD_FLUSH: "flush", wire.CMD_TRIM: "trim",
    wire.CMD_CACHE: "cache", wire.CMD_WRITE_ZEROES: "write zeroes", wire.CMD_BLOCK_STATUS: "block status",
}  # fmt: skip
_WRITING: Final = (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)
_FLAGS: Final = {
    wire.CMD_READ: wire.CMD_FLAG_DF,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_REQ_ONE,
}


def payload_length(request: Request, extended: bool) -> int:
    """Bytes that follow the header."""
    if request.command == wire.CMD_WRITE or (extended and request.flags & wire.CMD_FLAG_PAYLOAD_LEN):
        return request.length
    return 0


def check(request: Request, *, size: int, writable: bool, structured: bool, extended: bool, contexts: int) -> None:
    """:param contexts: how many metadata contexts were negotiated

    :raises ByreError: the request cannot be carried out; its errno is the answer
    """
    command, flags = request.command, request.flags
    name = _NAMES.get(command)
    if name is None:
        raise InvalidArgument(f"unknown request type {command}")
    allowed = _FLAGS.get(command, 0) | wire.CMD_FLAG_FUA
    if not structured:
        allowed &= ~wire.CMD_FLAG_DF
    if extended and command in (wire.CMD_WRITE, wire.CMD_BLOCK_STATUS):
        allowed |= wire.CMD_FLAG_PAYLOAD_LEN
    if flags & ~allowed:
        raise InvalidArgument(f"unsupported flags for {name}: {flags:#x}")
    if command in _WRITING and not writable:
        raise AccessDenied("Export is read-only", errno=errno.EPERM)
    if command == wire.CMD_FLUSH:
        return
    if command == wire.CMD_BLOCK_STATUS:
        if not contexts:
            raise InvalidArgument("block status needs a metadata context, and none was negotiated")
        if flags & wire.CMD_FLAG_PAYLOAD_LEN:
            return  # the range is in the payload
        if not request.length:
            raise InvalidArgument("need non-zero length")
    check_range(command, request.offset, request.length, size)


def check_range(command: int, offset: int, length: int, size: int) -> None:
    """:raises ByreError: the range is not inside the export"""
    if offset + length > size:
        kind = NoSpace if command in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES) else InvalidArgument
        raise kind(f"operation past EOF; From: {offset}, Len: {length}, Size: {size}")
    if command == wire.CMD_READ and length > wire.MAX_PAYLOAD:
        raise InvalidArgument(f"len ({length}) is larger than max len ({wire.MAX_PAYLOAD})")


def chosen_contexts(payload: bytes, negotiated: tuple[tuple[int, str], ...]) -> tuple[int, tuple[tuple[int, str], ...]]:
    """(length of the range, metadata contexts) from a block status request's payload.

    :raises InvalidArgument: malformed, or a context that was not negotiated
    """
    if len(payload) < 12 or len(payload) % 4:
        raise InvalidArgument(f"block status payload of {len(payload)} bytes")
    length = int.from_bytes(payload[:8], "big")
    wanted = [int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload), 4)]
    names = dict(negotiated)
    if len(wanted) > len(names) or len(set(wanted)) != len(wanted) or not set(wanted) <= set(names):
        raise InvalidArgument("block status payload names contexts that were not negotiated, or one twice")
    if not length:
        raise InvalidArgument("need non-zero length")
    return length, tuple((number, names[number]) for number in sorted(wanted))


def as_failure(error: BaseException) -> ByreError:
    """What to answer for anything that went wrong."""
    if isinstance(error, ByreError):
        return error
    if isinstance(error, MemoryError):
        return ByreError("out of memory", errno=errno.ENOMEM)
    return ByreError(f"internal error: {type(error).__name__}")
