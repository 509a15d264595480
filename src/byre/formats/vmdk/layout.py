"""The binary records of VMDK extents: headers, footer, markers. No I/O.

Specifications: VMware, "Virtual Disk Format 5.0" (hosted sparse extents, KDMV after their signature, stream-optimized
ones among them, and ESX sparse extents, COWD); libvmdk, "VMware Virtual Disk (VMDK) format". VMware has not documented
space-efficient sparse extents (SEsparse); what is known of them is here. All numbers are little-endian; on disk, places
and lengths are sectors of 512 bytes.
"""

from __future__ import annotations

import struct

from ...errors import ImageError, NotSupported
from ...typing import Final, NamedTuple
from ...units import SECTOR

__all__ = [
    "COWD_MAGIC",
    "GD_AT_END",
    "HEADER_SIZE",
    "KDMV_MAGIC",
    "SESPARSE_MAGIC",
    "CowdHeader",
    "Marker",
    "SeSparseHeader",
    "SparseHeader",
    "decode_cowd_header",
    "decode_footer",
    "decode_header",
    "decode_marker",
    "decode_sesparse_header",
    "decode_sesparse_volatile",
    "encode_cowd_header",
    "encode_footer",
    "encode_grain_marker",
    "encode_header",
    "encode_marker",
    "encode_sesparse_header",
]

KDMV_MAGIC: Final = b"KDMV"
COWD_MAGIC: Final = b"COWD"
SESPARSE_MAGIC: Final = b"\xbe\xba\xfe\xca\0\0\0\0"
_VOLATILE_MAGIC: Final = 0xCAFECAFE
HEADER_SIZE: Final = 512

FLAG_NEWLINES: Final = 1 << 0
"""The bytes from 73 on show whether a transfer changed line ends."""
FLAG_REDUNDANT: Final = 1 << 1
FLAG_ZERO_GRAINS: Final = 1 << 2
FLAG_COMPRESSED: Final = 1 << 16
FLAG_MARKERS: Final = 1 << 17

DEFLATE: Final = 1
GD_AT_END: Final = (1 << 64) - 1
"""Value of the grain directory's place in the header of a stream: the footer knows."""
ZERO_GRAIN: Final = 1
"""Grain table entry of a grain of zeroes, with ``FLAG_ZERO_GRAINS``."""

UNCLEAN_AT: Final = 72
"""Where in the header the byte lies that says that the extent was not closed."""

MAX_GRAIN: Final = 16 << 20
"""Bytes. VMware writes 64 KiB."""
MAX_TABLE_ENTRIES: Final = 512
MAX_TABLES: Final = 8 << 20
"""Grain tables of one extent; their directory has 32 MiB then."""
MAX_DESCRIPTOR: Final = 1 << 20
MAX_SECTORS: Final = (1 << 54) - 1

COWD_TABLE_ENTRIES: Final = 4096
SESPARSE_TABLE_ENTRIES: Final = 4096

MARKER_END: Final = 0
MARKER_TABLE: Final = 1
MARKER_DIRECTORY: Final = 2
MARKER_FOOTER: Final = 3

_NEWLINES: Final = b"\n \r\n"
_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH")
_COWD: Final = struct.Struct("<4s7I")
_SESPARSE: Final = struct.Struct("<26Q")
_VOLATILE: Final = struct.Struct("<4Q")
_MARKER: Final = struct.Struct("<QII")
_GRAIN_MARKER: Final = struct.Struct("<QI")


def _unsupported(message: str) -> ImageError:
    # A decoder raises nothing but ImageError; errno says that it is not the bytes' fault.
    return ImageError(message, errno=NotSupported.default_errno)


# -- hosted sparse extents ------------------------------------------------------------------------


class SparseHeader(NamedTuple):
    """The "Hosted Sparse Extent Header". Places and lengths are sectors.

    :ivar capacity: of the extent on the disk
    :ivar redundant_directory: where the redundant grain directory lies; it counts with ``FLAG_REDUNDANT``
    :ivar directory: where the grain directory lies, or ``GD_AT_END``
    :ivar overhead: what metadata takes at the beginning
    :ivar unclean: a program that writes has not closed the extent
    """

    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_length: int
    table_entries: int
    redundant_directory: int
    directory: int
    overhead: int
    unclean: int = 0
    compression: int = 0

    @property
    def compressed(self) -> bool:
        return self.compression == DEFLATE

    @property
    def markers(self) -> bool:
        return bool(self.flags & FLAG_MARKERS)

    @property
    def zero_grains(self) -> bool:
        return bool(self.flags & FLAG_ZERO_GRAINS)

    @property
    def redundant(self) -> bool:
        return bool(self.flags & FLAG_REDUNDANT and self.redundant_directory)

    @property
    def table_count(self) -> int:
        """Grain tables that the capacity takes."""
        return -(-self.capacity // (self.grain * self.table_entries))


def encode_header(header: SparseHeader) -> bytes:
    """The inverse of :func:`decode_header`."""
    h = header
    newlines = _NEWLINES if h.flags & FLAG_NEWLINES else bytes(4)
    return _HEADER.pack(
        KDMV_MAGIC, h.version, h.flags, h.capacity, h.grain, h.descriptor, h.descriptor_length, h.table_entries,
        h.redundant_directory, h.directory, h.overhead, h.unclean, newlines, h.compression,
    ).ljust(HEADER_SIZE, b"\0")  # fmt: skip


def decode_header(data: bytes | bytearray | memoryview) -> SparseHeader:
    """
    :raises ImageError: it breaks the format; errno ENOTSUP for a version or compression nobody knows
    """
    if len(data) < HEADER_SIZE:
        raise ImageError(f"a VMDK header takes {HEADER_SIZE} bytes, here are {len(data)}")
    magic, version, flags, *numbers, unclean, newlines, compression = _HEADER.unpack_from(data)
    if magic != KDMV_MAGIC:
        raise ImageError(f"this is no VMDK extent: it begins with {magic!r}, not {KDMV_MAGIC!r}")
    if not 1 <= version <= 3:
        raise _unsupported(f"unsupported VMDK version {version}; versions 1 to 3 are known")
    if flags & FLAG_NEWLINES and newlines != _NEWLINES:
        raise ImageError("the line ends in the header were changed: the file went through a transfer in text mode")
    if compression > DEFLATE:
        raise _unsupported(f"unknown compression method {compression}")
    header = SparseHeader._make((version, flags, *numbers, unclean, compression))
    check_geometry(header.capacity, header.grain, header.table_entries)
    if header.descriptor_length * SECTOR > MAX_DESCRIPTOR:
        raise ImageError(f"the descriptor has {header.descriptor_length * SECTOR} bytes, allowed are {MAX_DESCRIPTOR}")
    for what, sector in (("descriptor", header.descriptor), ("overhead", header.overhead)):
        if sector > MAX_SECTORS:
            raise ImageError(f"the {what} ends at sector {sector:#x}, allowed is {MAX_SECTORS:#x}")
    return header


def check_geometry(capacity: int, grain: int, table_entries: int) -> None:
    """:raises ImageError: numbers outside the limits"""
    if not 1 <= grain <= MAX_GRAIN // SECTOR or grain & (grain - 1):
        raise ImageError(f"invalid granularity: a grain of {grain} sectors, allowed are powers of two up to "
                         f"{MAX_GRAIN // SECTOR}; the image may be corrupt")  # fmt: skip
    if not 1 <= table_entries <= max(MAX_TABLE_ENTRIES, COWD_TABLE_ENTRIES):
        raise ImageError(f"a grain table (L2) of {table_entries} entries, allowed are 1 to {MAX_TABLE_ENTRIES}")
    if capacity > MAX_SECTORS:
        raise ImageError(f"a capacity of {capacity} sectors, allowed are {MAX_SECTORS} (L1 size too big)")
    tables = -(-capacity // (grain * table_entries))
    if tables > MAX_TABLES:
        raise ImageError(f"a grain directory (L1) of {tables} entries is too big, allowed are {MAX_TABLES}")


# -- streams: markers and footer ------------------------------------------------------------------


class Marker(NamedTuple):
    """A sector between the parts of a stream, or the beginning of a compressed grain.

    :ivar value: sectors of metadata that follow; for a grain, its first sector on the disk
    :ivar size: bytes of compressed data; 0 for other parts
    :ivar type: one of ``MARKER_...``, where ``size`` is 0
    """

    value: int
    size: int
    type: int


GRAIN_MARKER_SIZE: Final = 12


def decode_marker(data: bytes | bytearray | memoryview) -> Marker:
    """:raises ImageError: it is too short"""
    if len(data) < _MARKER.size:
        raise ImageError(f"a marker takes {_MARKER.size} bytes, here are {len(data)}")
    return Marker._make(_MARKER.unpack_from(data))


def encode_marker(marker: Marker) -> bytes:
    return _MARKER.pack(*marker).ljust(SECTOR, b"\0")


def encode_grain_marker(sector: int, size: int) -> bytes:
    """What stands before ``size`` bytes of compressed data of the grain at ``sector`` of the disk."""
    return _GRAIN_MARKER.pack(sector, size)


FOOTER_SIZE: Final = 3 * SECTOR
"""Footer marker, footer, end-of-stream marker: the end of a stream."""


def decode_footer(data: bytes | bytearray | memoryview) -> SparseHeader:
    """The header in the last 1536 bytes of a stream, which has the place of the grain directory.

    :raises ImageError: there is none
    """
    if len(data) < FOOTER_SIZE:
        raise ImageError(f"a footer takes {FOOTER_SIZE} bytes, here are {len(data)}")
    before, behind = decode_marker(data), decode_marker(data[2 * SECTOR :])
    if (before.size, before.type) != (0, MARKER_FOOTER) or behind != (0, 0, MARKER_END):
        raise ImageError("invalid footer: the stream seems to be cut short")
    header = decode_header(data[SECTOR : 2 * SECTOR])
    if header.directory == GD_AT_END:
        raise ImageError("invalid footer: it does not say where the grain directory is")
    return header


def encode_footer(header: SparseHeader) -> bytes:
    """The inverse of :func:`decode_footer`."""
    end = encode_marker(Marker(0, 0, MARKER_END))
    return encode_marker(Marker(1, 0, MARKER_FOOTER)) + encode_header(header) + end


# -- ESX sparse extents ---------------------------------------------------------------------------


class CowdHeader(NamedTuple):
    """The header of "ESX Server Sparse Extents". Places and lengths are sectors."""

    version: int
    flags: int
    capacity: int
    grain: int
    directory: int
    directory_entries: int
    free_sector: int = 0


def encode_cowd_header(header: CowdHeader) -> bytes:
    """The inverse of :func:`decode_cowd_header`; what describes the disk to people is left empty."""
    return _COWD.pack(COWD_MAGIC, *header).ljust(4 * SECTOR, b"\0")


def decode_cowd_header(data: bytes | bytearray | memoryview) -> CowdHeader:
    """:raises ImageError: it breaks the format"""
    if len(data) < _COWD.size:
        raise ImageError(f"a COWD header takes {_COWD.size} bytes at least, here are {len(data)}")
    magic, *numbers = _COWD.unpack_from(data)
    if magic != COWD_MAGIC:
        raise ImageError(f"this is no COWD extent: it begins with {magic!r}")
    header = CowdHeader(*numbers)
    if header.version != 1:
        raise _unsupported(f"unsupported COWD version {header.version}; version 1 is known")
    check_geometry(header.capacity, header.grain, COWD_TABLE_ENTRIES)
    needed = -(-header.capacity // (header.grain * COWD_TABLE_ENTRIES))
    if header.directory_entries < needed:
        raise ImageError(f"the grain directory has {header.directory_entries} entries, the capacity needs {needed}")
    return header


# -- space-efficient sparse extents ---------------------------------------------------------------


class SeSparseHeader(NamedTuple):
    """The constant header of an SEsparse extent, as far as it is needed. Places and lengths are sectors."""

    capacity: int
    volatile: int
    directory: int
    directory_length: int
    tables: int
    tables_length: int
    grains: int
    grains_length: int


SESPARSE_VERSION: Final = 0x200000001
SESPARSE_GRAIN: Final = 8
_SESPARSE_TABLE: Final = 64


def encode_sesparse_header(header: SeSparseHeader) -> bytes:
    """The inverse of :func:`decode_sesparse_header`; journal, free bitmap and back map are left out."""
    h = header
    words = [0xCAFEBABE, SESPARSE_VERSION, h.capacity, SESPARSE_GRAIN, _SESPARSE_TABLE] + [0] * 21
    words[10:12] = h.volatile, 1
    words[16:20] = h.directory, h.directory_length, h.tables, h.tables_length
    words[24:26] = h.grains, h.grains_length
    return _SESPARSE.pack(*words).ljust(HEADER_SIZE, b"\0")


def decode_sesparse_header(data: bytes | bytearray | memoryview) -> SeSparseHeader:
    """Strict, because nobody but VMware knows what other values would mean.

    :raises ImageError: it breaks what is known of the format
    """
    if len(data) < HEADER_SIZE:
        raise ImageError(f"an SEsparse header takes {HEADER_SIZE} bytes, here are {len(data)}")
    words = _SESPARSE.unpack_from(data)
    if bytes(data[:8]) != SESPARSE_MAGIC:
        raise ImageError(f"this is no SEsparse extent: it begins with {bytes(data[:8])!r}")
    for what, found, known in (("version", words[1], SESPARSE_VERSION), ("grain size", words[3], SESPARSE_GRAIN),
                               ("grain table size", words[4], _SESPARSE_TABLE), ("flags", words[5], 0)):  # fmt: skip
        if found != known:
            raise _unsupported(f"unsupported SEsparse {what} {found:#x}; {known:#x} is known")
    if any(words[6:10]) or any(data[_SESPARSE.size : HEADER_SIZE]):
        raise _unsupported("reserved fields of the SEsparse header are in use")
    header = SeSparseHeader(words[2], words[10], *words[16:20], *words[24:26])
    check_geometry(header.capacity, SESPARSE_GRAIN, SESPARSE_TABLE_ENTRIES)
    for what, place in zip(header._fields, header, strict=True):
        if place > MAX_SECTORS:
            raise ImageError(f"the SEsparse header's field {what!r} is {place:#x}, allowed is {MAX_SECTORS:#x}")
    needed = -(-header.capacity // (SESPARSE_GRAIN * SESPARSE_TABLE_ENTRIES))
    if header.directory_length * (SECTOR // 8) < needed:
        raise ImageError(f"the grain directory of {header.directory_length} sectors lacks entries, {needed} are needed")
    return header


def encode_sesparse_volatile(journal: bool = False) -> bytes:
    """A volatile header; ``journal``: there are changes to replay."""
    return _VOLATILE.pack(_VOLATILE_MAGIC, 0, 0, int(journal)).ljust(HEADER_SIZE, b"\0")


def decode_sesparse_volatile(data: bytes | bytearray | memoryview) -> bool:
    """Whether the journal of an SEsparse extent holds changes that are not in its tables yet.

    :raises ImageError: this is no volatile header
    """
    if len(data) < _VOLATILE.size:
        raise ImageError(f"an SEsparse volatile header takes {_VOLATILE.size} bytes, here are {len(data)}")
    magic, _, _, replay = _VOLATILE.unpack_from(data)
    if magic != _VOLATILE_MAGIC:
        raise ImageError(f"this is no SEsparse volatile header: it begins with {magic:#x}")
    return bool(replay)
