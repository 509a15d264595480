"""VHD structures (Microsoft, "Virtual Hard Disk Image Format Specification" 1.0): footer, dynamic header, geometry.

Pure codecs, big-endian, and the limits of what they say; whether things lie inside the file is for whoever knows its
length. The checksum of a structure is the one's complement of the sum of its bytes, without those of the checksum.
"""

from __future__ import annotations

import struct

from ...errors import ImageError
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import SECTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "DIFFERENCING",
    "DYNAMIC",
    "FIXED",
    "FOOTER_SIZE",
    "HEADER_SIZE",
    "MAX_GEOMETRY",
    "MAX_SECTORS",
    "NONE",
    "NO_OFFSET",
    "DynamicHeader",
    "Footer",
    "Locator",
    "bitmap_size",
    "covering_geometry",
    "decode_dynamic_header",
    "decode_footer",
    "disk_size",
    "encode_dynamic_header",
    "encode_footer",
    "geometry",
]

FIXED: Final = 2
DYNAMIC: Final = 3
DIFFERENCING: Final = 4
TYPE_NAMES: Final = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

FOOTER_SIZE: Final = 512
HEADER_SIZE: Final = 1024
NONE: Final = 0xFFFFFFFF
"""Block table entry of a block that is not there."""
NO_OFFSET: Final = 0xFFFFFFFFFFFFFFFF
MAX_SECTORS: Final = 0xFF000000
"""2040 GiB."""
MAX_TABLE: Final = 32 << 20
"""Bytes of the block table that are accepted."""
TIME_BASE: Final = 946684800
"""Time stamps count seconds from the beginning of 2000; this is that moment in seconds since 1970."""

_COOKIE: Final = b"conectix"
_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_FOOTER_CHECKSUM: Final = 64
_DYNAMIC: Final = struct.Struct(">8sQQIIII16sII512s")
_DYNAMIC_CHECKSUM: Final = 36
_LOCATOR: Final = struct.Struct(">4sIIIQ")
_LOCATORS: Final = 8

MAX_CYLINDERS: Final = 65535
MAX_HEADS: Final = 16
MAX_TRACK: Final = 255
MAX_GEOMETRY: Final = MAX_CYLINDERS * MAX_HEADS * MAX_TRACK
"""Sectors of the largest geometry: an image that has it may be larger."""

_BY_GEOMETRY: Final = (b"vpc ", b"qemu")
"""Programs that left a size in the footer which nobody keeps to; what counts is the geometry."""


class Footer(NamedTuple):
    """Hard disk footer; sizes in bytes.

    :ivar data_offset: of the dynamic header
    :ivar timestamp: seconds since 2000
    :ivar sectors: per track
    :ivar unique_id: by which differencing disks name their parent
    """

    features: int
    version: int
    data_offset: int
    timestamp: int
    creator_application: bytes
    creator_version: int
    creator_host: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    sectors: int
    disk_type: int
    unique_id: bytes
    saved_state: int = 0
    reserved: bytes = bytes(427)

    @property
    def chs_sectors(self) -> int:
        return self.cylinders * self.heads * self.sectors


def checksum(data: bytes | bytearray, at: int) -> int:
    """The checksum of ``data``, which holds its own at ``at``."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def _sealed(data: bytes, at: int) -> bytes:
    return data[:at] + checksum(data, at).to_bytes(4, "big") + data[at + 4 :]


def decode_footer(data: bytes | bytearray) -> Footer:
    """
    :raises ImageError: no footer, or a damaged one
    """
    if len(data) < FOOTER_SIZE:
        raise ImageError(f"the footer has {len(data)} bytes, expected are {FOOTER_SIZE}")
    data = bytes(data[:FOOTER_SIZE])
    cookie, *fields = _FOOTER.unpack(data)
    if cookie != _COOKIE:
        raise ImageError(f"the footer begins with {cookie!r}, expected is {_COOKIE!r}")
    stored = fields.pop(13)
    found = checksum(data, _FOOTER_CHECKSUM)
    if stored != found:
        raise ImageError(f"the checksum of the footer is {stored:#010x}, its content has {found:#010x}")
    footer = Footer(*fields)
    if footer.disk_type not in TYPE_NAMES:
        raise ImageError(f"the disk type is {footer.disk_type}, allowed are 2 (fixed), 3 (dynamic), 4 (differencing)")
    return footer


def encode_footer(footer: Footer) -> bytes:
    data = _FOOTER.pack(_COOKIE, *footer[:13], 0, *footer[13:])
    return _sealed(data, _FOOTER_CHECKSUM)


def disk_size(footer: Footer, rule: str = "") -> int:
    """The size of the disk, bytes: by its geometry or by what the footer says, which depends on who made it.

    :param rule: "chs" or "current_size" decides instead of the creator; the largest geometry says nothing
    :raises ImageError: it is larger than the format allows
    """
    by_geometry = footer.creator_application in _BY_GEOMETRY or rule == "chs"
    sectors = footer.chs_sectors
    if not by_geometry or sectors == MAX_GEOMETRY or rule == "current_size":
        sectors = footer.current_size // SECTOR
    if sectors > MAX_SECTORS:
        raise ImageError(f"the disk has {sectors} sectors, allowed are {MAX_SECTORS} (2040 GiB)")
    return sectors * SECTOR


# -- the dynamic header ---------------------------------------------------------------------------


class Locator(NamedTuple):
    """Where a name of the parent is kept.

    :ivar platform: "W2ru" relative, "W2ku" absolute (UTF-16, little-endian), "Wi2r", "Wi2k" (older), "MacX" (URL)
    :ivar length: of the name, bytes
    """

    platform: bytes
    space: int
    length: int
    offset: int


class DynamicHeader(NamedTuple):
    """Dynamic disk header.

    :ivar max_entries: of the block table
    :ivar parent_name: of a differencing disk's parent, without folders
    :ivar tail: the reserved bytes at the end
    """

    data_offset: int
    table_offset: int
    version: int
    max_entries: int
    block_size: int
    parent_id: bytes = bytes(16)
    parent_timestamp: int = 0
    parent_name: str = ""
    locators: tuple[Locator, ...] = ()
    tail: bytes = bytes(256)


def decode_dynamic_header(data: bytes | bytearray) -> tuple[DynamicHeader, bool]:
    """(header, whether its checksum is right): peers do not look at the checksum.

    :raises ImageError: no header, or one with impossible sizes
    """
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the dynamic header has {len(data)} bytes, expected are {HEADER_SIZE}")
    data = bytes(data[:HEADER_SIZE])
    cookie, next_at, table, version, entries, block_size, stored, parent, timestamp, _, name = _DYNAMIC.unpack_from(
        data
    )
    if cookie != b"cxsparse":
        raise ImageError(f"the dynamic header begins with {cookie!r}, expected is b'cxsparse'")
    if block_size < SECTOR or block_size & (block_size - 1):
        raise ImageError(f"the block size is {block_size}, allowed are powers of two from {SECTOR}")
    rows = _LOCATOR.iter_unpack(data[_DYNAMIC.size : _DYNAMIC.size + _LOCATORS * _LOCATOR.size])
    locators = tuple(Locator(platform, space, length, offset) for platform, space, length, _, offset in rows)
    text = name.decode("utf-16-be", "replace").partition("\0")[0]
    header = DynamicHeader(next_at, table, version, entries, block_size, parent, timestamp, text, locators,
                           data[_DYNAMIC.size + _LOCATORS * _LOCATOR.size :])  # fmt: skip
    return header, stored == checksum(data, _DYNAMIC_CHECKSUM)


def encode_dynamic_header(header: DynamicHeader) -> bytes:
    name = header.parent_name.encode("utf-16-be")[:512]
    data = _DYNAMIC.pack(b"cxsparse", header.data_offset, header.table_offset, header.version, header.max_entries,
                         header.block_size, 0, header.parent_id, header.parent_timestamp, 0, name)  # fmt: skip
    rows = b"".join(_LOCATOR.pack(each.platform, each.space, each.length, 0, each.offset) for each in header.locators)
    return _sealed(data + rows.ljust(_LOCATORS * _LOCATOR.size, b"\0") + header.tail, _DYNAMIC_CHECKSUM)


def bitmap_size(block_size: int) -> int:
    """Bytes of the sector bitmap before each block: a bit for each sector, in whole sectors."""
    return -(-block_size // (8 * SECTOR * SECTOR)) * SECTOR


# -- geometry (appendix "CHS calculation") --------------------------------------------------------


def geometry(sectors: int) -> tuple[int, int, int]:
    """(cylinders, heads, sectors per track) for a disk of ``sectors``; they may come to a little less."""
    sectors = min(sectors, MAX_GEOMETRY)
    if sectors >= 65535 * 16 * 63:
        return sectors // MAX_TRACK // 16, 16, MAX_TRACK
    tracks = sectors // 17
    heads = max(-(-tracks // 1024), 4)
    track = 17
    if tracks >= heads * 1024 or heads > 16:
        heads, track = 16, 31
        tracks = sectors // track
    if tracks >= heads * 1024:
        heads, track = 16, 63
        tracks = sectors // track
    return tracks // heads, heads, track


def covering_geometry(sectors: int) -> tuple[int, int, int]:
    """The geometry of the smallest disk of at least ``sectors``; the largest one if there is none."""
    wanted = min(sectors, MAX_GEOMETRY)
    asked = wanted
    found = geometry(asked)
    while found[0] * found[1] * found[2] < wanted:
        asked += 1
        found = geometry(asked)
    return found


def locator_rows(locators: Sequence[Locator]) -> tuple[Locator, ...]:
    """Those that are used."""
    return tuple(each for each in locators if each.platform.strip(b"\0") and each.length)
