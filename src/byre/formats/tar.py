"""Members of a tar archive: names and places, as much of the format as appliances have. Codec and a walk with limits.

Specification: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format"
(long names, sizes in base 256). Sparse members are refused.
"""

from __future__ import annotations

from ..errors import ImageError
from ..typing import TYPE_CHECKING, Final, NamedTuple
from .opening import read_exactly

if TYPE_CHECKING:
    from ..graph.node import Node

__all__ = ["MAX_MEMBERS", "Member", "decode_attributes", "decode_member", "members"]

BLOCK: Final = 512
MAX_MEMBERS: Final = 4096
"""Headers of all kinds."""
MAX_NAME: Final = 4096
MAX_ATTRIBUTES: Final = 64 << 10
"""Bytes of the attributes before a member."""

_PLAIN: Final = b"0\x007"
_LONG_NAME: Final = b"L"
_ATTRIBUTES: Final = b"x"
_WITHOUT_DATA: Final = b"123456"


class Member(NamedTuple):
    """:ivar kind: the type flag
    :ivar size: of its data, bytes
    """

    name: bytes
    kind: bytes
    size: int


def decode_member(data: bytes | bytearray | memoryview) -> Member | None:
    """A header, 512 bytes; ``None`` is the end of the archive.

    :raises ImageError: it is no header
    """
    raw = bytes(data[:BLOCK])
    if len(raw) < BLOCK:
        raise ImageError(f"a header has {len(raw)} bytes, expected are {BLOCK}")
    if not raw.strip(b"\0"):
        return None
    if _number(raw[148:156], "checksum") != sum(raw[:148]) + 8 * 0x20 + sum(raw[156:]):
        raise ImageError("the checksum of a header is wrong")
    kind, name = raw[156:157], raw[:100].partition(b"\0")[0]
    if raw[257:263] == b"ustar\0":
        prefix = raw[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    if kind == b"S":
        raise ImageError(f"the member {name!r} is sparse, which is not supported")
    return Member(name, kind, 0 if kind in _WITHOUT_DATA else _number(raw[124:136], "size"))


def _number(field: bytes, what: str) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    else:
        text = field.strip(b" \0") or b"0"
        if any(byte not in b"01234567" for byte in text):
            raise ImageError(f"the {what} in a header is {field!r}")
        value = int(text, 8)
    if value >> 62:
        raise ImageError(f"the {what} in a header is {value}")
    return value


def decode_attributes(data: bytes | bytearray | memoryview) -> dict[bytes, bytes]:
    """The records of a pax header block: "length key=value" with a line end.

    :raises ImageError: they break the format
    """
    raw, at = bytes(data), 0
    found: dict[bytes, bytes] = {}
    while at < len(raw) and raw[at]:
        digits = raw[at : at + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = raw[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or at + length > len(raw) or not equals or not value.endswith(b"\n"):
            raise ImageError(f"the attributes of a member break the format at byte {at}")
        found[key] = value[:-1]
        at += length
    return found


def members(file: Node) -> dict[str, tuple[int, int]]:
    """(offset, length) of the plain files in the archive, by name, in their order; of a name that is there twice, the
    first.

    :raises ImageError: it is no tar archive, ends early, or has too many members
    """
    result: dict[str, tuple[int, int]] = {}
    at, count = 0, 0
    name, attributes = b"", dict[bytes, bytes]()
    while at + BLOCK <= file.size:
        member = decode_member(read_exactly(file, at, BLOCK, "header of a member"))
        if member is None:
            break
        count += 1
        if count > MAX_MEMBERS:
            raise ImageError(f"the archive has more than {MAX_MEMBERS} members", where=file.filename)
        at += BLOCK
        size = _size(attributes, member.size) if member.kind not in (_LONG_NAME, _ATTRIBUTES) else member.size
        if at + size > file.size:
            raise ImageError(f"the member {(name or member.name)!r} ends at {at + size:#x}, past the end of the file "
                             f"({file.size:#x})", where=file.filename)  # fmt: skip
        if member.kind == _LONG_NAME:
            name = bytes(_head(file, at, size, MAX_NAME)).partition(b"\0")[0]
        elif member.kind == _ATTRIBUTES:
            attributes = decode_attributes(_head(file, at, size, MAX_ATTRIBUTES))
        else:
            if member.kind in _PLAIN:
                found = attributes.get(b"path") or name or member.name
                result.setdefault(found.decode("utf-8", "replace"), (at, size))
            name, attributes = b"", {}
        at += -(-size // BLOCK) * BLOCK
    return result


def _size(attributes: dict[bytes, bytes], size: int) -> int:
    text = attributes.get(b"size", b"")
    return int(text) if text.isdigit() and len(text) < 19 else size


def _head(file: Node, at: int, size: int, limit: int) -> bytearray:
    if size > limit:
        raise ImageError(f"what describes a member has {size} bytes, allowed are {limit}", where=file.filename)
    return read_exactly(file, at, size, "description of a member")
