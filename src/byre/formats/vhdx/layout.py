"""VHDX structures ([MS-VHDX] 2.2 to 2.6): headers, region table, metadata, parent locator, block table entries.

Pure codecs, little-endian, and the limits of what they say; whether things lie inside the file is for whoever knows
its length. The log is in :mod:`.log`. GUIDs are kept as the 16 bytes on disk.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from ...errors import ImageError
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import GIB, MIB, TIB
from .crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "BAT_REGION",
    "BLOCK_NAMES",
    "FULLY_PRESENT",
    "HEADER_OFFSETS",
    "HEADER_SIZE",
    "METADATA_REGION",
    "NO_GUID",
    "OFFSET_MASK",
    "PARTIALLY_PRESENT",
    "REGION_OFFSETS",
    "SIGNATURE",
    "STATE_MASK",
    "TABLE_SIZE",
    "Header",
    "MetadataEntry",
    "Parameters",
    "Region",
    "bat_entries",
    "chunk_ratio",
    "current_header",
    "decode_file_parameters",
    "decode_header",
    "decode_metadata_table",
    "decode_parent_locator",
    "decode_region_table",
    "encode_header",
    "encode_metadata_table",
    "encode_region_table",
    "guid_text",
    "new_guid",
    "sealed",
]

SIGNATURE: Final = b"vhdxfile"
HEADER_OFFSETS: Final = (64 << 10, 128 << 10)
HEADER_SIZE: Final = 4096
REGION_OFFSETS: Final = (192 << 10, 256 << 10)
TABLE_SIZE: Final = 64 << 10
"""Bytes of a region table, and of a metadata table."""

MAX_ENTRIES: Final = 2047
MAX_VIRTUAL_SIZE: Final = 64 * TIB
MIN_BLOCK: Final = MIB
MAX_BLOCK: Final = 256 * MIB
SECTOR_SIZES: Final = (512, 4096)
ITEM_LIMIT: Final = MIB

NO_GUID: Final = bytes(16)
_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
_TABLE_HEAD: Final = struct.Struct("<4sIII")
_REGION: Final = struct.Struct("<16sQII")
_METADATA_HEAD: Final = struct.Struct("<8sHH20x")
_METADATA: Final = struct.Struct("<16sIIII")
_LOCATOR_HEAD: Final = struct.Struct("<16sHH")
_LOCATOR_ENTRY: Final = struct.Struct("<IIHH")


def guid_bytes(text: str) -> bytes:
    """The bytes on disk of ``01234567-89ab-cdef-0123-456789abcdef``: the first three groups are little-endian."""
    first, second, third, *rest = text.strip("{}").split("-")
    groups = (bytes.fromhex(group)[::-1] for group in (first, second, third))
    return b"".join(groups) + bytes.fromhex("".join(rest))


def guid_text(guid: bytes) -> str:
    groups = (guid[3::-1], guid[5:3:-1], guid[7:5:-1], guid[8:10], guid[10:])
    return "-".join(group.hex() for group in groups)


def new_guid() -> bytes:
    """A random GUID, version 4."""
    import os

    data = bytearray(os.urandom(16))
    data[7] = data[7] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return bytes(data)


BAT_REGION: Final = guid_bytes("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION: Final = guid_bytes("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS: Final = guid_bytes("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_SIZE: Final = guid_bytes("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
PAGE_83: Final = guid_bytes("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR: Final = guid_bytes("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR: Final = guid_bytes("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR: Final = guid_bytes("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
PARENT_VHDX: Final = guid_bytes("b04aefb7-d19e-4a81-b789-25b8e9445913")

# -- block table entries (2.5.1.1) ----------------------------------------------------------------

STATE_MASK: Final = 7
OFFSET_MASK: Final = 0xFFFFFFFFFFF00000
RESERVED_MASK: Final = 0xFFFF8
NOT_PRESENT: Final = 0
UNDEFINED: Final = 1
ZERO: Final = 2
UNMAPPED: Final = 3
UNMAPPED_DRAFT: Final = 5
"""What version 0.95 of the specification had for unmapped blocks."""
FULLY_PRESENT: Final = 6
PARTIALLY_PRESENT: Final = 7
BLOCK_NAMES: Final = (
    "not present", "undefined", "zero", "unmapped", "4", "unmapped", "fully present", "partially present",
)  # fmt: skip


def chunk_ratio(block_size: int, logical_sector: int) -> int:
    """Payload blocks per sector bitmap block (2.5.1)."""
    return (logical_sector << 23) // block_size


def bat_entries(size: int, block_size: int, logical_sector: int, *, has_parent: bool) -> int:
    """Entries the block table needs (2.5): a sector bitmap entry follows every ``chunk_ratio`` payload entries."""
    blocks = -(-size // block_size)
    ratio = chunk_ratio(block_size, logical_sector)
    if has_parent:
        return -(-blocks // ratio) * (ratio + 1)
    return blocks + (blocks - 1) // ratio if blocks else 0


# -- checksums ------------------------------------------------------------------------------------


def sealed(data: bytes | bytearray) -> bytes:
    """``data`` with its checksum at bytes 4 to 7."""
    cleared = bytes(data[:4]) + bytes(4) + bytes(data[8:])
    return cleared[:4] + crc32c(cleared).to_bytes(4, "little") + cleared[8:]


def check_seal(data: bytes | bytearray | memoryview, what: str) -> None:
    """:raises ImageError: the checksum at bytes 4 to 7 is not that of ``data``"""
    stored = int.from_bytes(data[4:8], "little")
    found = crc32c(bytes(data[:4]) + bytes(4) + bytes(data[8:]))
    if stored != found:
        raise ImageError(f"the checksum of the {what} is {stored:#010x}, its content has {found:#010x}")


# -- headers (2.2.2) ------------------------------------------------------------------------------


class Header(NamedTuple):
    """One of the two headers.

    :ivar file_write_guid: changes when the file is opened for writing
    :ivar data_write_guid: changes when what the guest sees may change; children refer to their parent by it
    :ivar log_guid: of the entries in the log that count; all zero if the log is empty
    """

    sequence_number: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int


def decode_header(data: bytes | bytearray) -> Header:
    """:raises ImageError: no valid header"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the header has {len(data)} bytes, expected are {HEADER_SIZE}")
    signature, _, *fields = _HEADER.unpack_from(data)
    if signature != b"head":
        raise ImageError(f"the header begins with {signature!r}, expected is b'head'")
    check_seal(data[:HEADER_SIZE], "header")
    header = Header(*fields)
    if header.version != 1:
        raise ImageError(f"the version is {header.version}, expected is 1")
    return header


def encode_header(header: Header) -> bytes:
    return sealed(_HEADER.pack(b"head", 0, *header).ljust(HEADER_SIZE, b"\0"))


def current_header(first: bytes | bytearray, second: bytes | bytearray) -> tuple[int, Header]:
    """(index, header) of the one that counts: the valid one with the higher sequence number.

    :raises ImageError: neither is valid, or both claim to be the current one
    """
    found: list[tuple[int, Header]] = []
    errors: list[str] = []
    for index, data in enumerate((first, second)):
        try:
            found.append((index, decode_header(data)))
        except ImageError as error:
            errors.append(error.message)
    if not found:
        raise ImageError(f"no valid VHDX header found: {errors[0]}; the other: {errors[1]}")
    if len(found) == 2 and found[0][1].sequence_number == found[1][1].sequence_number and found[0][1] != found[1][1]:
        raise ImageError(f"both headers have sequence number {found[0][1].sequence_number}, but they differ")
    index, header = max(found, key=lambda pair: (pair[1].sequence_number, -pair[0]))
    _check_log_place(header)
    return index, header


def _check_log_place(header: Header) -> None:
    if header.log_version:
        raise ImageError(f"the log has version {header.log_version}, expected is 0")
    if (header.log_length % MIB or header.log_offset % MIB or (header.log_length and header.log_offset < MIB)
            or (header.log_offset + header.log_length) >> 63):  # fmt: skip
        raise ImageError(f"the log of {header.log_length} bytes at {header.log_offset:#x} is not made of whole "
                         "mebibytes behind the headers")  # fmt: skip


# -- the region table (2.2.3) ---------------------------------------------------------------------


class Region(NamedTuple):
    """A part of the file; ``offset`` and ``length`` in bytes, multiples of 1 MiB."""

    guid: bytes
    offset: int
    length: int
    required: bool = True

    @property
    def end(self) -> int:
        return self.offset + self.length


def decode_region_table(data: bytes | bytearray) -> tuple[Region, ...]:
    """The regions; block table and metadata are among them, once each, and none overlaps another.

    :raises ImageError: the table breaks the format, or requires what is unknown
    """
    if len(data) < TABLE_SIZE:
        raise ImageError(f"the region table has {len(data)} bytes, expected are {TABLE_SIZE}")
    signature, _, count, _ = _TABLE_HEAD.unpack_from(data)
    if signature != b"regi":
        raise ImageError(f"the region table begins with {signature!r}, expected is b'regi'")
    if count > MAX_ENTRIES:
        raise ImageError(f"the region table has {count} entries, allowed are {MAX_ENTRIES}")
    check_seal(data[:TABLE_SIZE], "region table")
    regions = tuple(
        Region(guid, offset, length, bool(flags & 1))
        for guid, offset, length, flags in _REGION.iter_unpack(data[16 : 16 + 32 * count])
    )
    _check_regions(regions)
    return regions


def _check_regions(regions: Sequence[Region]) -> None:
    for number, region in enumerate(regions):
        if region.offset % MIB or region.length % MIB or region.offset < MIB or region.end >> 63:
            raise ImageError(f"region {number} of {region.length} bytes at {region.offset:#x} is not made of whole "
                             "mebibytes behind the headers")  # fmt: skip
        if region.required and region.guid not in (BAT_REGION, METADATA_REGION):
            raise ImageError(f"region {number} ({guid_text(region.guid)}) is required, but not known")
    for guid, name in ((BAT_REGION, "block table"), (METADATA_REGION, "metadata")):
        count = sum(region.guid == guid for region in regions)
        if count != 1:
            raise ImageError(f"there are {count} regions for the {name}, expected is 1")
    check_apart(regions)


def check_apart(regions: Sequence[Region]) -> None:
    """:raises ImageError: two regions overlap"""
    ordered = sorted((region for region in regions if region.length), key=lambda region: region.offset)
    for one, other in pairwise(ordered):
        if other.offset < one.end:
            raise ImageError(f"the region at {other.offset:#x} begins inside the one at {one.offset:#x}, which ends at "
                             f"{one.end:#x}")  # fmt: skip


def encode_region_table(regions: Sequence[Region]) -> bytes:
    rows = b"".join(_REGION.pack(region.guid, region.offset, region.length, region.required) for region in regions)
    return sealed((_TABLE_HEAD.pack(b"regi", 0, len(regions), 0) + rows).ljust(TABLE_SIZE, b"\0"))


# -- metadata (2.6) -------------------------------------------------------------------------------

IS_USER: Final = 1
IS_VIRTUAL_DISK: Final = 2
IS_REQUIRED: Final = 4

_KNOWN_ITEMS: Final = (FILE_PARAMETERS, VIRTUAL_SIZE, PAGE_83, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR)


class MetadataEntry(NamedTuple):
    """:ivar offset: from the beginning of the metadata region; 0 for an empty item"""

    item: bytes
    offset: int
    length: int
    flags: int


class Parameters(NamedTuple):
    """What the metadata say about the disk, sizes in bytes.

    :ivar fixed: blocks stay allocated
    :ivar size_at: where the file holds the virtual size
    :ivar parent: keys and values of the parent locator; empty without a parent
    """

    block_size: int
    fixed: bool
    has_parent: bool
    size: int
    logical_sector: int
    physical_sector: int
    size_at: int
    parent: Mapping[str, str]


def decode_metadata_table(data: bytes | bytearray) -> dict[bytes, MetadataEntry]:
    """System items by their GUID.

    :raises ImageError: the table breaks the format, or requires what is unknown
    """
    if len(data) < TABLE_SIZE:
        raise ImageError(f"the metadata table has {len(data)} bytes, expected are {TABLE_SIZE}")
    signature, _, count = _METADATA_HEAD.unpack_from(data)
    if signature != b"metadata":
        raise ImageError(f"the metadata table begins with {signature!r}, expected is b'metadata'")
    if count > MAX_ENTRIES:
        raise ImageError(f"the metadata table has {count} entries, allowed are {MAX_ENTRIES}")
    found: dict[bytes, MetadataEntry] = {}
    for number, row in enumerate(_METADATA.iter_unpack(data[32 : 32 + 32 * count])):
        entry = MetadataEntry(*row[:4])
        if entry.length > ITEM_LIMIT or (entry.offset and entry.offset < TABLE_SIZE):
            raise ImageError(f"metadata entry {number} has {entry.length} bytes at {entry.offset:#x}, allowed are "
                             f"{ITEM_LIMIT} from {TABLE_SIZE:#x} on")  # fmt: skip
        if entry.item not in _KNOWN_ITEMS or entry.flags & IS_USER:
            if entry.flags & IS_REQUIRED:
                raise ImageError(f"metadata item {guid_text(entry.item)} is required, but not known")
            continue
        if entry.item in found:
            raise ImageError(f"metadata item {guid_text(entry.item)} is there twice")
        found[entry.item] = entry
    return found


def encode_metadata_table(entries: Sequence[MetadataEntry]) -> bytes:
    rows = b"".join(_METADATA.pack(*entry, 0) for entry in entries)
    return (_METADATA_HEAD.pack(b"metadata", 0, len(entries)) + rows).ljust(TABLE_SIZE, b"\0")


def decode_file_parameters(data: bytes | bytearray) -> tuple[int, bool, bool]:
    """(block size, blocks stay allocated, has a parent) (2.6.2.1).

    :raises ImageError: a block size that is no power of two from 1 MiB to 256 MiB
    """
    if len(data) < 8:
        raise ImageError(f"the file parameters have {len(data)} bytes, expected are 8")
    block_size, flags = struct.unpack_from("<II", data)
    if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size & (block_size - 1):
        raise ImageError(f"the block size is {block_size}, allowed are powers of two from {MIN_BLOCK} to {MAX_BLOCK}")
    return block_size, bool(flags & 1), bool(flags & 2)


def decode_parent_locator(data: bytes | bytearray) -> dict[str, str]:
    """Keys and values of the parent locator (2.6.2.6).

    :raises ImageError: it breaks the format, or is not that of a VHDX parent
    """
    if len(data) < _LOCATOR_HEAD.size:
        raise ImageError(f"the parent locator has {len(data)} bytes, expected are at least {_LOCATOR_HEAD.size}")
    kind, _, count = _LOCATOR_HEAD.unpack_from(data)
    if kind != PARENT_VHDX:
        raise ImageError(f"the parent locator is of type {guid_text(kind)}, which is not known")
    if _LOCATOR_HEAD.size + count * _LOCATOR_ENTRY.size > len(data) or count > 256:
        raise ImageError(f"the parent locator of {len(data)} bytes has {count} entries")
    found: dict[str, str] = {}
    for number in range(count):
        row = _LOCATOR_ENTRY.unpack_from(data, _LOCATOR_HEAD.size + number * _LOCATOR_ENTRY.size)
        key_at, value_at, key_length, value_length = row
        if key_at + key_length > len(data) or value_at + value_length > len(data):
            raise ImageError(f"entry {number} of the parent locator reaches past its end at {len(data)}")
        key, value = data[key_at : key_at + key_length], data[value_at : value_at + value_length]
        found[key.decode("utf-16-le", "replace")] = value.decode("utf-16-le", "replace")
    return found


def default_block_size(size: int) -> int:
    """What creation chooses for a disk of ``size`` bytes, so that the block table stays small; the peer's rule."""
    for limit, block_size in ((GIB, 8 * MIB), (100 * GIB, 16 * MIB), (32 * TIB, 32 * MIB)):
        if size <= limit:
            return block_size
    return 64 * MIB
