"""The LUKS2 header (on-disk format specification 1.1.2): two binary headers, each before a JSON area.

Pure codecs, for reading. Offsets and sizes are bytes. What byre does not need (tokens, labels) is not looked at; what
it would have to honour and cannot (integrity, re-encryption, several segments) is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import hmac
import struct
from typing import Final, NamedTuple, cast

from ..errors import ImageError, printable
from .luks_layout import MAGIC

__all__ = [
    "BINARY_SIZE",
    "SECOND_MAGIC",
    "BinaryHeader",
    "Digest",
    "Metadata",
    "Segment",
    "Slot",
    "decode_binary_header",
    "decode_metadata",
    "verify_area",
]

SECOND_MAGIC: Final = b"SKUL\xba\xbe"
BINARY_SIZE: Final = 4096
AREA_SIZES: Final = tuple(1 << bits for bits in range(14, 23))
"""Sizes that a binary header and its JSON area may have together; also where the second one begins."""
MAX_DEPTH: Final = 16
MAX_SLOTS: Final = 32
MAX_OFFSET: Final = 1 << 62
MAX_KEY_SIZE: Final = 128

_BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_CHECKSUM_AT: Final = 448


class BinaryHeader(NamedTuple):
    """:ivar area_size: of the binary header and the JSON text together
    :ivar sequence: the newer of two headers has the higher one
    """

    area_size: int
    sequence: int
    hash_name: str
    uuid: str
    offset: int
    checksum: bytes


class Slot(NamedTuple):
    """One key slot.

    :ivar kdf: its parameters as they stand: type, salt, hash and iterations, or time, memory and cpus
    :ivar encryption: of the key material, e.g. "aes-xts-plain64"
    """

    number: int
    key_size: int
    kdf: dict[str, object]
    salt: bytes
    af_hash: str
    stripes: int
    encryption: str
    area_key_size: int
    offset: int
    size: int


class Segment(NamedTuple):
    """The encrypted data.

    :ivar size: 0 means up to the end
    """

    offset: int
    size: int
    first_sector: int
    encryption: str
    sector_size: int


class Digest(NamedTuple):
    """How to know the volume key. :ivar slots: the key slots it is for"""

    hash_name: str
    iterations: int
    salt: bytes
    digest: bytes
    slots: tuple[int, ...]


class Metadata(NamedTuple):
    """What the JSON area says."""

    slots: tuple[Slot, ...]
    segment: Segment
    digest: Digest


def decode_binary_header(data: bytes | bytearray | memoryview) -> BinaryHeader:
    """The first 4 KiB of a header area, the first or the second.

    :raises ImageError: a field is outside its limits
    """
    if len(data) < BINARY_SIZE:
        raise ImageError(f"a LUKS2 header takes {BINARY_SIZE} bytes, there are {len(data)}")
    magic, version, size, sequence, _, algorithm, _, uuid, _, offset, _, checksum = _BINARY.unpack_from(data)
    if magic not in (MAGIC, SECOND_MAGIC) or version != 2:
        raise ImageError("not a LUKS2 header: magic number or version differ")
    if size not in AREA_SIZES:
        raise ImageError(f"LUKS2 header field hdr_size is {size}, allowed are powers of two from 16 KiB to 4 MiB")
    if offset != (0 if magic == MAGIC else size):
        raise ImageError(f"LUKS2 header field hdr_offset is {offset:#x}, which is not where the header is")
    return BinaryHeader(size, sequence, _text(algorithm), _text(uuid), offset, checksum)


def verify_area(header: BinaryHeader, data: bytes | bytearray) -> bool:
    """Whether the whole area (``header.area_size`` bytes) has the checksum that it claims."""
    if header.hash_name not in ("sha1", "sha256", "sha384", "sha512"):
        return False
    digest = hashlib.new(header.hash_name)
    view = memoryview(data)
    digest.update(view[:_CHECKSUM_AT])
    digest.update(bytes(64))
    digest.update(view[_CHECKSUM_AT + 64 : header.area_size])
    return hmac.compare_digest(digest.digest(), header.checksum[: digest.digest_size])


def _text(field: bytes) -> str:
    return printable(field.partition(b"\0")[0].decode("ascii", "replace"))


def decode_metadata(data: bytes | bytearray | memoryview) -> Metadata:
    """What the JSON area says about keys and data.

    :param data: the area; text ends at the first zero byte
    :raises ImageError: it breaks the format
        (ENOTSUP: it needs something byre does not do)
    """
    root = _parse(bytes(data).partition(b"\0")[0])
    _check_requirements(root)
    segment = _segment(_table(root, "segments"))
    slots = tuple(_slot(index, _record(value, f"key slot {index}")) for index, value in _numbered(root, "keyslots"))
    return Metadata(tuple(slot for slot in slots if slot is not None), segment, _digest(root))


def _parse(text: bytes) -> dict[str, object]:
    import json

    depth = 0
    inside = escaped = False
    for byte in text:
        if inside:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in b"{[":
            depth += 1
            if depth > MAX_DEPTH:
                raise ImageError(f"the LUKS2 metadata is nested more than {MAX_DEPTH} deep")
        elif byte in b"}]":
            depth -= 1
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ImageError("the LUKS2 metadata cannot be parsed") from None
    return _record(value, "the metadata")


def _check_requirements(root: dict[str, object]) -> None:
    config = _table(root, "config")
    needed = config.get("requirements")
    mandatory = needed.get("mandatory") if isinstance(needed, dict) else None
    if mandatory:
        names = ", ".join(printable(str(name)) for name in mandatory) if isinstance(mandatory, list) else "unknown"
        raise _unsupported(f"the LUKS2 volume requires {names}, which is not supported")


def _segment(segments: dict[str, object]) -> Segment:
    if len(segments) != 1:
        raise _unsupported(f"the LUKS2 volume has {len(segments)} segments; only volumes with one are supported")
    record = _record(next(iter(segments.values())), "the segment")
    if record.get("type") != "crypt":
        raise _unsupported(f"LUKS2 segments of type {printable(str(record.get('type')))!r} are not supported")
    if "integrity" in record:
        raise _unsupported("LUKS2 volumes with integrity protection are not supported")
    sector_size = _number(record, "sector_size")
    if sector_size not in (512, 1024, 2048, 4096):
        raise ImageError(f"LUKS2 segment: sector_size is {sector_size}, allowed are 512 to 4096")
    size = 0 if record.get("size") == "dynamic" else _number(record, "size")
    offset = _number(record, "offset")
    if offset % 512 or size % sector_size:
        raise ImageError(f"LUKS2 segment of {size} bytes at {offset:#x} is not made of whole sectors")
    return Segment(offset, size, _number(record, "iv_tweak"), _word(record, "encryption"), sector_size)


def _slot(index: int, record: dict[str, object]) -> Slot | None:
    """``None`` for a kind of slot that holds no passphrase's key."""
    if record.get("type") != "luks2":
        return None
    area, kdf, af = (_record(record.get(name), f"{name} of key slot {index}") for name in ("area", "kdf", "af"))
    if area.get("type") != "raw" or af.get("type") != "luks1":
        raise _unsupported(f"LUKS2 key slot {index} keeps its key in a way that is not supported")
    key_size, area_key_size = _number(record, "key_size"), _number(area, "key_size")
    stripes, offset, size = _number(af, "stripes"), _number(area, "offset"), _number(area, "size")
    if not 1 <= key_size <= MAX_KEY_SIZE or not 1 <= area_key_size <= MAX_KEY_SIZE:
        raise ImageError(f"LUKS2 key slot {index} has keys of {key_size} and {area_key_size} bytes, allowed are up to "
                         f"{MAX_KEY_SIZE}")  # fmt: skip
    if stripes != 4000 or key_size * stripes > size or offset < AREA_SIZES[0]:
        raise ImageError(f"LUKS2 key slot {index}: {stripes} stripes in {size} bytes at {offset:#x} break its limits")
    return Slot(index, key_size, kdf, _binary(kdf, "salt"), _word(af, "hash"), stripes, _word(area, "encryption"),
                area_key_size, offset, size)  # fmt: skip


def _digest(root: dict[str, object]) -> Digest:
    for _, value in _numbered(root, "digests"):
        record = _record(value, "a digest")
        if not record.get("segments"):
            continue
        if record.get("type") != "pbkdf2":
            raise _unsupported(f"LUKS2 digests of type {printable(str(record.get('type')))!r} are not supported")
        slots = record.get("keyslots")
        if not isinstance(slots, list):
            raise ImageError("a LUKS2 digest names no key slots")
        numbers = tuple(int(text) for text in slots if isinstance(text, str) and text.isdecimal() and len(text) < 4)
        return Digest(_word(record, "hash"), _number(record, "iterations"), _binary(record, "salt"),
                      _binary(record, "digest"), numbers)  # fmt: skip
    raise ImageError("the LUKS2 metadata has no digest for its segment")


def _unsupported(message: str) -> ImageError:
    return ImageError(message, errno=errno.ENOTSUP)


# -- fields ---------------------------------------------------------------------------------------


def _record(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ImageError(f"LUKS2 metadata: {what} is no object")
    return cast("dict[str, object]", value)


def _table(root: dict[str, object], name: str) -> dict[str, object]:
    return _record(root.get(name, {}), name)


def _numbered(root: dict[str, object], name: str) -> list[tuple[int, object]]:
    found = []
    for key, value in _table(root, name).items():
        if not key.isascii() or not key.isdecimal() or int(key[:9]) >= MAX_SLOTS or len(key) > 9:
            raise ImageError(
                f"LUKS2 metadata: {name} has the number {printable(key)[:20]!r}, allowed are 0 to {MAX_SLOTS - 1}"
            )
        found.append((int(key), value))
    return sorted(found, key=lambda pair: pair[0])


def _number(record: dict[str, object], name: str) -> int:
    """A field that is a number, or a number in a text, as 64-bit fields are written."""
    value = record.get(name)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_OFFSET:
        raise ImageError(f"LUKS2 metadata: {name} is no number in its range")
    return value


def _word(record: dict[str, object], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or len(value) > 64:
        raise ImageError(f"LUKS2 metadata: {name} is no word")
    return value


def _binary(record: dict[str, object], name: str) -> bytes:
    value = record.get(name)
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise ImageError(f"LUKS2 metadata: {name} is no base64 text")


def kdf_number(slot: Slot, name: str) -> int:
    """A parameter of a slot's key derivation.

    :raises ImageError: it is missing or no number
    """
    return _number(slot.kdf, name)


def kdf_word(slot: Slot, name: str) -> str:
    """:raises ImageError: it is missing or no word"""
    return _word(slot.kdf, name)
