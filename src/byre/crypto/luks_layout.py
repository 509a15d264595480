"""The LUKS1 header (on-disk format specification 1.2.3, section 2). Pure codecs, no I/O.

All numbers are big-endian; offsets and sizes here are bytes, whatever unit the header has.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "HEADER_SIZE",
    "MAGIC",
    "SLOT_COUNT",
    "STRIPES",
    "Header",
    "KeySlot",
    "decode_header",
    "encode_header",
    "encode_slot",
    "new_slots",
    "slot_position",
    "version_of",
]

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_SIZE: Final = 592
SLOT_COUNT: Final = 8
STRIPES: Final = 4000
SECTOR: Final = 512
ALIGNMENT: Final = 4096
"""Key material begins at multiples of this, the first behind the header."""
MAX_KEY_SIZE: Final = 128
DIGEST_SIZE: Final = 20
SALT_SIZE: Final = 32

_ACTIVE: Final = 0x00AC71F3
_INACTIVE: Final = 0x0000DEAD
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")


class KeySlot(NamedTuple):
    """Where one passphrase's copy of the master key lies.

    :ivar offset: of the key material, bytes from the header's beginning
    """

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int = STRIPES


class Header(NamedTuple):
    """The partition header.

    :ivar cipher_name: "aes", ... ; the key size tells the rest
    :ivar cipher_mode: "xts-plain64", "cbc-essiv:sha256", ...
    :ivar payload_offset: bytes; 0 where the header lies apart from the data
    :ivar key_size: of the master key, bytes
    :ivar digest: of the master key
    """

    cipher_name: str
    cipher_mode: str
    hash_name: str
    payload_offset: int
    key_size: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def material_size(self) -> int:
        """Bytes of key material in a slot."""
        return self.key_size * STRIPES


def version_of(data: bytes | bytearray | memoryview) -> int:
    """1 or 2 for the beginning of a LUKS header, 0 for anything else."""
    if len(data) < 8 or bytes(data[:6]) != MAGIC:
        return 0
    return int.from_bytes(data[6:8], "big")


def new_slots(key_size: int) -> tuple[tuple[KeySlot, ...], int]:
    """Eight inactive slots one behind the other, and the offset behind the last."""
    step = -(-key_size * STRIPES // ALIGNMENT) * ALIGNMENT
    slots = tuple(KeySlot(False, 0, bytes(SALT_SIZE), ALIGNMENT + index * step) for index in range(SLOT_COUNT))
    return slots, ALIGNMENT + SLOT_COUNT * step


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: a field is outside its limits"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the LUKS header takes {HEADER_SIZE} bytes, there are {len(data)}")
    magic, version, cipher, mode, hash_name, *rest = _HEADER.unpack_from(data)
    payload, key_size, digest, salt, iterations, uuid = rest
    if magic != MAGIC:
        raise ImageError("not a LUKS volume: the magic number is missing")
    if version != 1:
        raise ImageError(f"LUKS version {version} has another header than version 1")
    if not 1 <= key_size <= MAX_KEY_SIZE:
        raise ImageError(f"LUKS header field key-bytes is {key_size}, allowed are 1 to {MAX_KEY_SIZE}")
    slots = tuple(
        _decode_slot(data[_HEADER.size + index * _SLOT.size :][: _SLOT.size], index) for index in range(SLOT_COUNT)
    )
    header = Header(
        _text(cipher, "cipher-name"), _text(mode, "cipher-mode"), _text(hash_name, "hash-spec"), payload * SECTOR,
        key_size, digest, salt, iterations, _text(uuid, "uuid"), slots,
    )  # fmt: skip
    _check_areas(header)
    return header


def _decode_slot(data: bytes | bytearray | memoryview, index: int) -> KeySlot:
    state, iterations, salt, sector, stripes = _SLOT.unpack(data)
    if state not in (_ACTIVE, _INACTIVE):
        raise ImageError(f"LUKS key slot {index} has state {state:#x}, allowed are {_ACTIVE:#x} and {_INACTIVE:#x}")
    if stripes != STRIPES:
        raise ImageError(f"LUKS key slot {index} has {stripes} stripes, allowed are {STRIPES}")
    return KeySlot(state == _ACTIVE, iterations, salt, sector * SECTOR, stripes)


def _check_areas(header: Header) -> None:
    """Header, key material and payload lie apart."""
    size = header.material_size
    areas = sorted((slot.offset, index) for index, slot in enumerate(header.slots))
    before, end = "the header", HEADER_SIZE
    for offset, index in areas:
        if offset < end:
            raise ImageError(f"the material of LUKS key slot {index} at {offset:#x} overlaps {before}, up to {end:#x}")
        before, end = f"that of key slot {index}", offset + size
    if header.payload_offset and end > header.payload_offset:
        raise ImageError(
            f"LUKS key material ends at {end:#x}, behind the payload's start at {header.payload_offset:#x}"
        )


def _text(field: bytes, what: str) -> str:
    text, zero, _ = field.partition(b"\0")
    if not zero or not text.isascii() or not text.decode("ascii").isprintable():
        raise ImageError(f"LUKS header field {what} is no text that ends in a zero byte")
    return text.decode("ascii")


def encode_header(header: Header) -> bytes:
    """The 592 bytes of the header."""
    data = _HEADER.pack(
        MAGIC, 1, header.cipher_name.encode(), header.cipher_mode.encode(), header.hash_name.encode(),
        header.payload_offset // SECTOR, header.key_size, header.digest, header.digest_salt, header.digest_iterations,
        header.uuid.encode(),
    )  # fmt: skip
    return data + b"".join(_encode_slots(header.slots))


def _encode_slots(slots: Sequence[KeySlot]) -> list[bytes]:
    return [encode_slot(slot) for slot in slots]


def encode_slot(slot: KeySlot) -> bytes:
    """A slot's 48 bytes; its state comes first, in four."""
    state = _ACTIVE if slot.active else _INACTIVE
    return _SLOT.pack(state, slot.iterations, slot.salt, slot.offset // SECTOR, slot.stripes)


def slot_position(index: int) -> int:
    """Where slot ``index`` begins in the header."""
    return _HEADER.size + index * _SLOT.size
